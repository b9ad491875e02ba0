"""DATABASE_URL with several hosts, in libpq's and in SQLAlchemy's form."""

from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import create_engine, make_url

from app.config import database_url
from tests.support.cases import Failures

WRITABLE, ANY = "target_session_attrs=read-write", "target_session_attrs=any"


def test_every_form_of_several_hosts_is_read() -> None:
    """Breaks if one form is rejected or misread, a standby is accepted by default, or `up` cannot pass the URL on."""
    failures = Failures()
    for value, expected in (
        ("postgresql://u:p%40@a:1,b/d", f"u:p%40@/d?host=a,b&port=1,5432&{WRITABLE}"),
        ("postgres://u@a,b/d?sslmode=require", f"u@/d?host=a,b&port=5432,5432&sslmode=require&{WRITABLE}"),
        ("postgresql://u:p%40@/d?host=a:1&host=b", f"u:p%40@/d?host=a,b&port=1,5432&{WRITABLE}"),
        ("postgresql://u:p%40@/d?host=a,b&port=1,2", f"u:p%40@/d?host=a,b&port=1,2&{WRITABLE}"),
        ("postgresql://u@c/d?host=a,b&port=1", f"u@/d?host=a,b&port=1,1&{WRITABLE}"),
        ("postgresql://u@[::1]:1,[fe80::2]/d", f"u@/d?host=::1,fe80::2&port=1,5432&{WRITABLE}"),
        ("postgresql://u@/d?host=[::1]:1&host=::2", f"u@/d?host=::1,::2&port=1,5432&{WRITABLE}"),
        (f"postgresql:///d?host=/a,/b&{ANY}", f"/d?host=/a,/b&port=5432,5432&{ANY}"),
        (f"postgresql://a,b/d?{ANY}&sslrootcert=/a%20b", f"/d?host=a,b&port=5432,5432&{ANY}&sslrootcert=/a%20b"),
    ):
        with failures.of(value):
            read = database_url.read(value)
            assert read == f"postgresql+psycopg://{expected}"
            assert database_url.read(read) == read
            # SQLAlchemy passes to psycopg what libpq itself reads from the URL.
            _, found = create_engine(read).dialect.create_connect_args(make_url(read))
            plain = conninfo_to_dict(read.replace("+psycopg", ""))
            assert {name: found[name] for name in plain} == plain
    assert failures == {}


def test_one_host_stays_as_it_is() -> None:
    """Breaks if a URL that worked before is read in another way."""
    for rest in ("u:p@h/d", "u:p@h:1/d?x=1", "u@[::1]:1/d", "/d?host=/run", "/d?host=h:1"):
        assert database_url.read(f"postgresql://{rest}") == f"postgresql+psycopg://{rest}"
