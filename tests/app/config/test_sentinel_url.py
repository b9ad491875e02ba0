"""URLs of Redis behind Sentinel."""

import pytest

from app.config import sentinel_url
from app.config.settings import Settings, load
from app.errors import Misconfigured

THREE = (("one", 26379), ("two", 26380), ("three", 26379))


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://user:p%40ss@one,two:26380,three/2?master=headrace",
        "sentinel://user:p%40ss@one:26379;sentinel://two:26380;sentinel://three/2?master=headrace",
        "sentinel://user:p%40ss@one/2;sentinel://user:p%40ss@two:26380/2;sentinel://user:p%40ss@three/2?master=headrace",
    ],
)
def test_both_forms_name_the_sentinels_and_the_login(url: str) -> None:
    """Breaks if a form is read in another way, or a password is in the repr."""
    found = sentinel_url.read(url)
    assert (found.sentinels, found.master, found.database) == (THREE, "headrace", 2)
    assert (found.username, found.password, found.tls) == ("user", "p@ss", None)
    assert "p@ss" not in repr(found)
    assert found.first == "sentinel://user:p%40ss@one:26379/2"
    assert load({"BROKER_URL": url}).need_redis() == url


def test_tls_and_logins_of_sentinels_are_options() -> None:
    """Breaks if an option does not reach redis-py, or certificates are not verified by default."""
    options = "master=m&sentinel_username=s&sentinel_password=t&ssl=true&ssl_ca_certs=/ca.pem"
    found = sentinel_url.read(f"sentinel://one?{options}")
    assert (found.sentinel_username, found.sentinel_password) == ("s", "t")
    assert dict(found.tls or ()) == {
        "ssl_ca_certs": "/ca.pem",
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }
    assert found.sentinel_tls == found.tls
    assert sentinel_url.read(f"sentinel://one?{options}&sentinel_ssl=false").sentinel_tls is None


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://one",
        "sentinel://one/0?master=",
        "sentinel://one/0?master=a b",
        "sentinel://one/0?master=m&mastr=m",
        "sentinel://one/0?master=m&master=n",
        "sentinel://one/0?master=m&ssl=maybe",
        "sentinel://one/0?master=m&ssl_cert_reqs=some",
        "sentinel://one/x?master=m",
        "sentinel://one/1,two/2?master=m",
        "sentinel://a:b@one,c:d@two?master=m",
        "sentinel://one,,two?master=m",
        "sentinel://one:0?master=m",
        "sentinel://?master=m",
        "redis://one;redis://two",
    ],
)
def test_other_urls_are_refused_without_showing_them(url: str) -> None:
    """Breaks if a typing error is ignored, or a URL is accepted with which kombu would change the transport."""
    for name in ("BROKER_URL", "REDIS_URL"):
        with pytest.raises(Misconfigured, match=f"{name}: not usable; it should be redis://") as caught:
            load({name: url})
        assert url not in str(caught.value)


def test_the_rate_limits_use_a_sentinel() -> None:
    """Breaks if REDIS_URL or the broker behind Sentinel is not used for rate limits."""
    url = "sentinel://one?master=m"
    assert Settings(broker_url="amqp://h", redis_url=url).need_redis() == url
    assert Settings(broker_url=url).has_redis
