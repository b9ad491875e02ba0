"""`headrace listen`: a receiver of notifications for the user's own tests."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click
from standardwebhooks import Webhook, WebhookVerificationError

from workers.local.ports import need_port

MAX_BODY = 1024 * 1024
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="port on 127.0.0.1 (default: a free one)")
@click.option("--refuse", type=click.IntRange(0), default=0, help="answer 503 to the first N notifications")
@click.option("--secret", help="the signing secret of the subscription (whsec_...), to check signatures")
def listen(*, port: int, refuse: int, secret: str | None) -> None:
    """Receive notifications on this machine and print them. Meant for your own tests; Ctrl-C stops it."""
    if port:
        need_port("127.0.0.1", port, "--port")
    with NotificationReceiver(port, refuse, secret, click.echo) as receiver:
        click.echo(f"headrace subscriptions add NAME --url http://127.0.0.1:{receiver.server_port}/")
        try:
            receiver.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


class NotificationReceiver(ThreadingHTTPServer):
    """Prints each notification. Answers 503 to the first `refuse`, 401 to wrong signatures, else 204."""

    daemon_threads = True

    def __init__(self, port: int, refuse: int, secret: str | None, show: Callable[[str], None]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.refuse, self.show, self.verifier = refuse, show, Webhook(secret) if secret else None

    def status_for(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """The status of the answer, and the result of the signature check."""
        signature = "not checked"
        if self.verifier:
            try:
                self.verifier.verify(body, headers)
            except (WebhookVerificationError, ValueError):
                return 401, "wrong"
            signature = "valid"
        if self.refuse > 0:
            self.refuse -= 1
            return 503, signature
        return 204, signature


class _Handler(BaseHTTPRequestHandler):
    server: NotificationReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_BODY))
        headers = {name: self.headers.get(name, "") for name in HEADERS}
        status, signature = self.server.status_for(body, headers)
        text = body.decode("utf-8", "replace")
        self.server.show(f"{status} {headers['webhook-id']} (signature {signature}) {text}")  # in the order of arrival
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass
