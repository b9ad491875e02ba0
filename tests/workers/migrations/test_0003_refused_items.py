"""The migration 0003, from a database that Headrace 0.1 made and filled."""

from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.support import apply, delivery, rows, workout
from tests.support.database import settings_of
from workers.store.engine import make_writer
from workers.store.migrate import migrate

DEAD_LETTERS = """
SELECT d.user_id IS NOT DISTINCT FROM e.user_id AS is_same, item, items
FROM headrace.dead_letters d JOIN headrace.deliveries e USING (aggregator, message_id)"""


def test_a_version_of_the_future_no_longer_wins(old: Engine, settings: Settings) -> None:
    """Breaks if a record that a wrong clock dated years ahead can still not be corrected after the update."""
    with old.begin() as connection:
        connection.execute(text("UPDATE headrace.workouts SET version = '2099-01-01', stored_at = '2026-03-01'"))
        user, identifier = connection.execute(text("SELECT user_id, id FROM headrace.workouts LIMIT 1")).one()
    migrate(old)
    here = settings_of(settings, old.url.render_as_string(hide_password=False).replace("+psycopg", ""))
    writer = make_writer(here)
    assert apply(writer, here, delivery(workout(user, identifier, title="corrected"))) == {"applied": 1}
    assert rows(old, "SELECT title FROM health.workouts WHERE id = :id", id=identifier) == [{"title": "corrected"}]
    writer.dispose()


def test_dead_letters_know_their_user(old: Engine) -> None:
    """Breaks if a dead letter loses its user, or is taken for a single item."""
    migrate(old)
    assert rows(old, DEAD_LETTERS) == [{"is_same": True, "item": "", "items": 1}]
