"""Questions to the lines of a run (see `record`)."""

from __future__ import annotations


def of(lines: list[dict], what: str, part: str | None = None) -> list[dict]:
    return [line for line in lines if line["what"] == what and part in (None, line["part"])]


def figures(lines: list[dict], part: str) -> list[dict]:
    return of(lines, "figure", part)


def facts(lines: list[dict], part: str) -> dict[str, object]:
    """{name: value}; the last one counts where there are several."""
    return {line["name"]: line["value"] for line in of(lines, "fact", part)}


def failures(lines: list[dict]) -> list[dict]:
    """What failed: failures of any kind, checks that came out wrong, launches that ship and were not made.

    Wrong results first, then what the device or a process did not survive, then the rest.
    """
    wrong = [{**line, "kind": "wrong"} for line in of(lines, "check") if not line["ok"]]
    order = ("wrong", "fault", "died", "error", "out of memory", "over time", "stopped")
    found = wrong + of(lines, "failure") + unlaunched(lines)
    return sorted(found, key=lambda line: order.index(line["kind"]) if line["kind"] in order else len(order))


def unlaunched(lines: list[dict]) -> list[dict]:
    """One failure if the whole list of launches that ship was worked off and some were never made."""
    wanted = facts(lines, "right").get("shipped launches")
    if facts(lines, "run").get("rehearsal") or not isinstance(wanted, list):
        return []
    begun = [line["name"] for line in of(lines, "begin", "right") if line["name"].startswith("shipped ")]
    checks = [line for line in of(lines, "check", "right") if "launched" in line]
    if not begun or len(checks) != len(begun) or unfinished(lines, "right"):
        return []  # one failed or was not reached: its launches are not known to be missing
    missing = [title for title in wanted if not any(title in line["launched"] for line in checks)]
    if not missing:
        return []
    detail = f"no case launches {', '.join(missing)}"
    return [{"part": "right", "what": "failure", "name": "what ships", "kind": "error", "detail": detail}]


def unfinished(lines: list[dict], part: str) -> list[dict]:
    """What a part left out because its time was over."""
    return [line for line in of(lines, "absent", part) if line["why"].startswith("out of time")]
