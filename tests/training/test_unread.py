"""What could not be read is noted by many threads and written down by one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.tracker import JsonLines
from ldm_scale.training.unread import Unread


def test_threads_note_and_one_event_counts_all_and_names_a_few(tmp_path: Path) -> None:
    run_dir, unread = RunDir(tmp_path), Unread()
    tracker = JsonLines(run_dir)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: unread(f"key{i}", "truncated" if i % 4 else "removed", i), range(1000)))
    assert len(unread) == 1000
    unread.tell(tracker, 80)
    unread.tell_own(tracker, 160)  # nothing is left to tell
    unread("late", "removed", 5)
    unread.tell_own(tracker, 240)
    first, second = run_dir.read_lines(run_dir.events)
    assert first["reasons"] == {"removed": 250, "truncated": 750} and len(first["samples"]) == 8
    assert (second["images_seen"], [one["key"] for one in second["samples"]]) == (240, ["late"])
    assert unread.counts() == {"data/unread_removed": 251, "data/unread_truncated": 750}
