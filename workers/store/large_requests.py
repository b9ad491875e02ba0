"""Large requests: history requested outside Headrace, whose deliveries may arrive in any order."""

from dataclasses import asdict

from sqlalchemy import Connection, text

from workers.actions import LargeRequest

EXPECT = text("""
INSERT INTO headrace.large_requests AS stored (aggregator, reference, user_id, provider, expected)
VALUES (:aggregator, :reference, :user_id, :provider, :expected)
ON CONFLICT (aggregator, reference) DO UPDATE SET expected = excluded.expected
WHERE excluded.expected IS NOT NULL AND stored.expected IS DISTINCT FROM excluded.expected""")


def expect(connection: Connection, aggregator: str, announced: LargeRequest) -> bool:
    """Records an announced large request and its number of deliveries, if known. False if nothing was new.

    The deliveries themselves are counted in the ledger, by reference, because they may arrive before this announcement.
    """
    return connection.execute(EXPECT, asdict(announced) | {"aggregator": aggregator}).rowcount > 0
