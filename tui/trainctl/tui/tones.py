"""What a colour means here. Panels name meanings; `theme` turns them into colours, or into bold and dim without any."""

from enum import IntEnum


class Tone(IntEnum):
    """Meanings of text and lines. Every one is also told by a glyph or a word."""

    TEXT = 0
    STRONG = 1
    DIM = 2  # labels, units, old data
    FAINT = 3  # axes, separators
    TITLE = 4
    FOCUS = 5  # the title of the focused panel
    KEY = 6
    KEY_OFF = 7
    RUNNING = 8
    PAUSED = 9
    STALLED = 10
    LOST = 11
    FINISHED = 12
    STALE = 13
    GOOD = 14
    WARNING = 15
    ERROR = 16
    NOTE = 17
    STRUCK = 18  # a value too old to be believed
    CURSOR = 19  # the selected row
    CROSSHAIR = 20
    CURVE_1 = 21
    CURVE_2 = 22
    CURVE_3 = 23
    CURVE_4 = 24
    RAW_1 = 25  # the same curve before smoothing, or an abandoned branch
    RAW_2 = 26
    RAW_3 = 27
    RAW_4 = 28
    BAR = 29
    BAR_REST = 30
    MARK = 31
    BANNER = 32
    METER = 33  # bars of ranks and GPUs while all is well
    METER_2 = 34


CURVES = (Tone.CURVE_1, Tone.CURVE_2, Tone.CURVE_3, Tone.CURVE_4)
RAWS = (Tone.RAW_1, Tone.RAW_2, Tone.RAW_3, Tone.RAW_4)
