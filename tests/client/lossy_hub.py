"""A hub for tests whose publications go missing, come twice or come late, on purpose."""

from collections.abc import Callable

from client.scripted_hub import ScriptedHub
from trainctl.wire.messages import Body


class LossyHub(ScriptedHub):
    """Numbers and records everything; what it publishes may be lost, doubled or late."""

    held: list[tuple[bytes, bytes]]

    def publish(self, body: Body, fate: str = "sent") -> None:
        def act() -> None:
            send = self._server._send
            self._server._send = lambda topic, payload: self._carry(send, fate, topic, payload)  # type: ignore[method-assign]
            self._publish(body)
            self._server._send = send  # type: ignore[method-assign]

        self._call(act)

    def _carry(self, send: Callable[[bytes, bytes], None], fate: str, topic: bytes, payload: bytes) -> None:
        if fate == "held":
            self.held.append((topic, payload))
        for _ in range({"sent": 1, "doubled": 2}.get(fate, 0)):
            send(topic, payload)

    def release(self) -> None:
        """What was late arrives, the last one first."""

        def act() -> None:
            while self.held:
                self._server._send(*self.held.pop())

        self._call(act)

    def pack(self) -> None:
        """From here on nothing that was published so far can be had one by one."""

        def act() -> None:
            self.journal.clear()
            for kept in self._server._kept.values():
                kept._kept.clear()

        self._call(act)

    def beat(self) -> None:
        self._call(self._server.beat)
