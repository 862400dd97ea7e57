"""Runs the cockpit on a scripted session; started by tests in a terminal of their own."""

import asyncio

from scripted_session import ScriptedSession, snapshot

from trainctl.tui import app


async def opened(ref: str | None, *, server_key: str | None = None) -> ScriptedSession:
    del ref, server_key
    return ScriptedSession(snapshot())


if __name__ == "__main__":
    app.open_session = opened  # type: ignore[assignment]
    print("left:", asyncio.run(app._run("gpt", owned=False, read_only=False, server_key=None)), flush=True)
