"""A picture of the cockpit on a real run, as SVG: `python -m trainctl.tui.picture RUN OUT.svg [--size 120x36]`."""

import argparse
import asyncio
import sys
from pathlib import Path

from trainctl.client.errors import ClientError
from trainctl.client.session import open_session
from trainctl.tui.app import CockpitApp
from trainctl.tui.theme import look_for

_PATIENCE_S = 20.0
_SETTLE_S = 2.0


async def take_picture(
    ref: str | None, size: tuple[int, int], *, keys: tuple[str, ...] = (), server_key: str | None = None
) -> str:
    """Open a run without a terminal, wait for its first full picture, press `keys`, and return the SVG.

    Raises `client.errors.ClientError`, or TimeoutError when no picture came.
    """
    session = await open_session(ref, server_key=server_key)
    try:
        app = CockpitApp(session, look=look_for(color_system="truecolor", no_color=False, glyphs="braille"))
        async with app.run_test(size=size) as pilot:
            async with asyncio.timeout(_PATIENCE_S):
                await app.first_picture.wait()
            # Figures of ranks and nodes come with the first seconds of a live run.
            await pilot.pause(_SETTLE_S if session.live else 0.1)
            if keys:
                await pilot.press(*keys)
                await pilot.pause()
            app.cockpit.redraw()
            await pilot.pause()
            return app.export_screenshot(title=f"trainctl tui {session.model.name}")
    finally:
        await session.close()


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainctl.tui.picture", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=_size, default=(120, 36), metavar="WIDTHxHEIGHT")
    parser.add_argument("--press", default="", metavar="KEY,KEY", help="keys to press before the picture is taken")
    options = parser.parse_args(arguments)
    keys = tuple(key for key in options.press.split(",") if key)
    try:
        svg = asyncio.run(take_picture(options.run, options.size, keys=keys))
    except ClientError as error:
        print(f"{error.message}. {error.hint}", file=sys.stderr)
        return error.exit_code
    except TimeoutError:
        print(f"no picture of {options.run} within {_PATIENCE_S:.0f} s: is its hub busy?", file=sys.stderr)
        return 1
    options.out.write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
