"""The table of lamps on the terminal."""

COLUMN_GAP = 2
NAME_WIDTH = 24
COLOURS = {"bright": "green", "dim": "yellow", "dark": "red"}


def format_row(cells, widths):
    """One line of the table."""
    return (" " * COLUMN_GAP).join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def lamp_table(records, now):
    """The whole table, darkest lamps first."""
    order = {"dark": 0, "dim": 1, "bright": 2}
    ranked = sorted(records, key=lambda record: (order[record.status(now)], record.name))
    rows = [("LAMP", "STATUS", "SEEN", "LOAD")]
    for record in ranked:
        seen = f"{now - record.last_seen:.0f} s ago"
        rows.append((shorten(record.name, NAME_WIDTH), record.status(now), seen, f"{record.load_average:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(format_row(row, widths) for row in rows)


def shorten(text, width, mark="~"):
    """Cut a text that is too wide and mark the cut."""
    return text if len(text) <= width else text[: width - len(mark)] + mark


def status_colour(status):
    """The colour name of a status."""
    return COLOURS[status]
