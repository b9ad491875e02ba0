"""Bodies of lab and query events: fixed examples, not part of the simulated world."""

from typing import Any

from workers.simulator.shapes import at, between, nulls, variable

ORDER = "2c6ba9f4-c8bc-43ef-a888-5d4398e556e3"
_ORDERED = {"id": 1, "created_at": at(-86400), "status": "received.testkit.ordered"}
_CREATED_AND_UPDATED = {"created_at": at(-86400), "updated_at": at()}
_POSTED = {"id": 2, "created_at": at(-3600), "status": "collecting_sample.testkit.transit_customer"}


# By the event's name without its last part (created, updated).
BODIES: dict[str, Any] = {
    "labtest.order": {
        "id": ORDER,
        "user_id": variable("user_id"),
        "team_id": variable("team_id"),
        **nulls("patient_details", "patient_address"),
        "lab_test": {
            "id": "60a502e1-60b5-412b-813d-c68183dc21c5",
            "slug": "lipids-panel",
            "name": "Lipids Panel",
            "sample_type": "dried_blood_spot",
            "method": "testkit",
            "price": 1.0,
            "is_active": True,
            "status": "active",
            **nulls("lab", "markers"),
        },
        "details": {
            "type": "testkit",
            "data": {"id": "a655f0e4-6405-4a1d-80b7-66f06c2108a7", "shipment": None, **_CREATED_AND_UPDATED},
        },
        "sample_id": "123456789",
        **_CREATED_AND_UPDATED,
        "events": [_ORDERED, _POSTED],
        "last_event": _POSTED,
        "status": "collecting_sample",
        "has_abn": False,
        **nulls("notes", "health_insurance_id", "requisition_form_url", "shipping_details"),
    },
    "labtest.appointment": {
        "id": "7dc2a1b8-8794-4435-bc58-095746627a9b",
        "user_id": "0b1f7c54-33c8-4f0e-9d0c-0a8f2f0f6b11",
        "order_id": ORDER,
        "order_transaction_id": "7813d502-b374-4907-ab67-92590f74a4c1",
        "address": {"first_line": "1 Example Street", "city": "Exampleville", "state": "CA", "zip_code": "91189"},
        "location": {"lng": -122.4, "lat": 37.7},
        "start_at": at(86400),
        "end_at": at(90000),
        "iana_timezone": "America/New_York",
        "type": "phlebotomy",
        "provider": "getlabs",
        "status": "confirmed",
        "provider_id": "123",
        "can_reschedule": True,
        "event_status": "scheduled",
        "events": [{"created_at": at(), "status": "scheduled"}],
    },
    "labtest.result": {
        "order_id": ORDER,
        "sample_id": "123456789",
        "status": "final",
        "interpretation": "critical",
        "team_id": variable("team_id"),
        "user_id": variable("user_id"),
        "created_at": at(),
        "updated_at": at(),
    },
    "labtest.match_review": {
        "id": "3cbb3271-62b2-439e-b4c0-60ed9a33d62e",
        "status": "matched",
        "decision_code": "match_sample_id",
    },
    "lab_report.parsing_job": {
        "id": "8eb0217f-4683-4a3c-adca-faf95ac65739",
        "status": "started",
        "data": None,
        "needs_human_review": False,
        "is_reviewed": False,
    },
    "continuous_query.result_table": [
        {
            "query_id": "95895d21-a29b-47df-8dde-e85a23cb70a6",
            "query_slug": "weekly-sleep",
            "data": {"sleep_score": [between(60, 95, 1), between(60, 95, 1)]},
        }
    ],
}

# The envelopes of these events name no user.
WITHOUT_USER = frozenset({"labtest.match_review"})
