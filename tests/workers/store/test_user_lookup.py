"""Users are found by user_id in any case of letters, by client_user_id, and by former user_id."""

import pytest
from sqlalchemy import Engine

from tests.support.database import run
from workers.aggregators.common import canonical_id
from workers.store import user_lookup
from workers.store.engine import transaction

ID = "8a7f2c04-5c49-4a0b-9d4e-7b7f3f1d2c11"
OWN = "5E0F2C04-5C49-4A0B-9D4E-7B7F3F1D2C11"  # a deployment's own id, in capitals


@pytest.fixture
def people(engine: Engine) -> None:
    run(
        engine,
        f"""INSERT INTO headrace.users (user_id, client_user_id, merged_into, erased_at) VALUES
        ('{ID}', '{OWN}', NULL, NULL), ('former', NULL, '{ID}', NULL), ('Mixed', 'team', NULL, NULL),
        ('other', 'team', NULL, NULL), ('team-2', 'mixed-2', NULL, NULL), ('gone', NULL, NULL, now()),
        ('u1', 'u2', NULL, NULL), ('u2', 'u1', NULL, NULL)""",
    )


@pytest.mark.usefixtures("people")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        (ID, [ID]),
        (ID.upper(), [ID]),
        (OWN, [ID]),
        ("former", [ID]),
        ("mixed", ["Mixed"]),
        ("FORMER", [ID]),
        ("team", ["Mixed", "other"]),
        ("TEAM", []),
        ("gone", ["gone"]),
        ("u1", ["u1"]),
        ("nobody", []),
        ("", []),
        ("%", []),
    ],
)
def test_each_form_of_a_name(engine: Engine, name: str, found: list[str]) -> None:
    """Breaks if a phone's spelling of a UUID matches no user, or a name matches a user that it does not name."""
    with transaction(engine) as connection:
        assert [one.user_id for one in user_lookup.find(connection, name)] == found


def test_only_uuids_are_normalised() -> None:
    """Breaks if an id of another form, in which case matters, is changed."""
    assert canonical_id(ID.upper()) == ID
    for name in ("Member-1", ID.upper()[:-1], ID.upper() + "0", "8A7F2C045C494A0B9D4E7B7F3F1D2C11", ""):
        assert canonical_id(name) == name


@pytest.mark.usefixtures("people")
def test_candidates_are_similar_and_not_erased(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert user_lookup.candidates(connection, "mixd-2") == ["mixed-2", "Mixed"]
        assert user_lookup.candidates(connection, "gone") == []
        assert user_lookup.candidates(connection, ID[:-1] + "2") == [ID]


def test_candidates_are_bounded(engine: Engine) -> None:
    """Breaks if a typing error reads every user into memory, or omits the most similar ones."""
    run(
        engine,
        """INSERT INTO headrace.users (user_id, client_user_id)
        SELECT 'user-' || n, 'member-' || lpad(n::text, 5, '0') FROM generate_series(1, 5000) n""",
    )
    with transaction(engine) as connection:
        found = user_lookup.candidates(connection, "membr-00321")
    assert len(found) == user_lookup.MAX_CANDIDATES
    assert found[0].endswith("321")
    assert "member-00321" in found
