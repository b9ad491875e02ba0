"""Large requests: history that somebody asked an aggregator for elsewhere, counted as it comes in, in any order."""

from sqlalchemy import Connection, text

from workers.actions import LargeRequest

EXPECT = text("""
INSERT INTO headrace.large_requests AS stored (aggregator, reference, user_id, provider, expected)
VALUES (:aggregator, :reference, :user_id, :provider, :expected)
ON CONFLICT (aggregator, reference) DO UPDATE SET expected = excluded.expected
WHERE excluded.expected IS NOT NULL AND stored.expected IS DISTINCT FROM excluded.expected""")


def expect(connection: Connection, aggregator: str, announced: LargeRequest) -> bool:
    """Notes that it is on its way, and of how many deliveries it is made, if that was said. False if that was known.

    Nothing is counted here: what came is in the ledger, by reference, and may have come before this.
    """
    values = {
        "aggregator": aggregator,
        "reference": announced.reference,
        "user_id": announced.user_id,
        "provider": announced.provider,
        "expected": announced.expected,
    }
    return connection.execute(EXPECT, values).rowcount > 0
