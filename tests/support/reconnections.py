"""The events of a user who reconnects at Terra and gets a new id."""

from datetime import timedelta
from typing import Any

import msgspec

from app.delivery import Delivery, Receipt, seal
from tests.support import SEALER, START

MINUTE = timedelta(minutes=1)


def user(user_id: str) -> dict[str, Any]:
    """A Terra user: `old` and `new` are ids of one person, `old-7` and `new-7` of another."""
    reference = f"member-{user_id.partition('-')[2] or 1}"
    return {"user_id": user_id, "provider": "PELOTON", "reference_id": reference}


def terra(minute: int, body: dict[str, Any], of: str = "") -> Delivery:
    """A delivery that Terra created at that minute; `of` distinguishes users."""
    ordering = int((START + minute * MINUTE).timestamp() * 1000)
    return seal("terra", Receipt(f"trace-{minute}{of}", ordering), msgspec.json.encode(body), SEALER)


def ride(user_id: str, ride_id: str, name: str) -> dict[str, Any]:
    """An activity event with two heart rate samples."""
    about = {"summary_id": ride_id, "name": name, "type": 8, "upload_type": 1}
    times = {"start_time": "2026-03-14T06:30:00+00:00", "end_time": "2026-03-14T07:00:00+00:00"}
    samples = [{"timestamp": f"2026-03-14T06:3{number}:00+00:00", "bpm": 100 + len(name)} for number in (1, 2)]
    heart = {"detailed": {"hr_samples": samples}}
    return {
        "type": "activity",
        "user": user(user_id),
        "data": [{"metadata": about | times, "heart_rate_data": heart}],
    }


def reauth(of: str = "") -> dict[str, Any]:
    """The event that announces a new user id."""
    ids = {"old_user": user(f"old{of}"), "new_user": user(f"new{of}")}
    return {"type": "user_reauth", "status": "warning"} | ids


def reconnection(of: str = "") -> tuple[Delivery, ...]:
    """The events of a reconnection, in order."""
    old, new = f"old{of}", f"new{of}"
    return (
        terra(1, ride(old, "r1", "a"), of),
        terra(2, {"type": "deauth", "status": "success", "user": user(old)}, of),
        terra(3, reauth(of), of),
        terra(4, {"type": "auth", "status": "success", "user": user(new)}, of),
        terra(5, ride(new, "r1", "the newest"), of),
    )


def late(of: str = "") -> Delivery:
    """An event of the former id that arrives after the reconnection."""
    return terra(6, ride(f"old{of}", "r2", "late"), of)


REAUTH = reauth()
EVENTS = reconnection()
