import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import download_plan
from data_tools.download_plan import Fetched, Plan, Recipe, prepare

NOTHING = pa.array([], pa.string())


def recipe(folder, **changes):
    values = {
        "metadata": str(folder), "url_column": None, "caption_column": None, "removal_list_sha256": None, "size": 256,
        "resize": "center_crop", "enlarge": True, "min_side": 0, "max_aspect": None, "format": "jpg", "quality": 95,
        "shard_size": 4,
    }  # fmt: skip
    return Recipe(**(values | changes))


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def rows_of(plan):
    return [row for file in sorted(plan.input.iterdir()) for row in pq.read_table(file).to_pylist()]


def finish(plan, number, rows):
    """A finished shard of failures and successes, as img2dataset writes it."""
    statuses = [
        {**row, "status": "success" if message is None else "failed_to_download", "error_message": message}
        for row, message in rows
    ]
    tar = plan.tar(number)
    tar.write_bytes(bytes(10_240))
    pq.write_table(pa.Table.from_pylist(statuses), tar.with_suffix(".parquet"))
    messages = [message or "success" for _, message in rows]
    failed = sum(message != "success" for message in messages)
    stats = {"count": len(rows), "successes": len(rows) - failed, "failed_to_download": failed, "failed_to_resize": 0}
    stats["status_dict"] = {message: messages.count(message) for message in messages}
    tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps(stats))


def test_input_has_one_spelling_whatever_the_release(tmp_path):
    write(tmp_path / "in/a.parquet", [{"URL": "u1", "TEXT": "one", "NSFW": "UNLIKELY", "HEIGHT": 4, "vector": [1.0]}])
    write(tmp_path / "in/b.parquet", [{"nsfw": "UNSURE", "url": "u2", "Caption": "two"}])
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    assert rows_of(plan) == [
        {"nsfw": "UNLIKELY", "caption": "one", "url": "u1"},
        {"nsfw": "UNSURE", "caption": "two", "url": "u2"},
    ]
    assert plan.columns == ["nsfw"] and plan.has_caption


def test_named_columns_win_and_missing_ones_are_named(tmp_path):
    write(tmp_path / "in/a.parquet", [{"link": "u1", "caption": "raw", "better": "good"}])
    with pytest.raises(ValueError, match="no column for url"):
        prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    with pytest.raises(ValueError, match="no column 'lnk'; it has link, caption, better"):
        prepare(tmp_path / "out", recipe(tmp_path / "in", url_column="lnk"), NOTHING)
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in", url_column="link", caption_column="better"), NOTHING)
    assert [(row["url"], row["caption"]) for row in rows_of(plan)] == [("u1", "good")]
    write(tmp_path / "in/b.parquet", [{"link": "u2", "caption": "raw"}])
    with pytest.raises(ValueError, match=r"b\.parquet has no column"):
        prepare(tmp_path / "out2", recipe(tmp_path / "in", url_column="link", caption_column="better"), NOTHING)


@pytest.mark.parametrize("column", ["url", "md5"])
def test_what_is_on_the_removal_list_is_never_asked_for(tmp_path, column):
    rows = [{"url": f"u{i}", "md5": f"m{i}"} for i in range(5)] + [{"url": None, "md5": "m"}, {"url": " ", "md5": "n"}]
    write(tmp_path / "in/a.parquet", rows)
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in"), pa.array([f"{column[0]}1", f"{column[0]}4"]))
    assert [row["url"] for row in rows_of(plan)] == ["u0", "u2", "u3"]
    assert plan.left_out == {"missing_url": 2, "removal_list": 2} and not plan.has_caption


def test_files_are_whole_numbers_of_shards_and_digits_suffice(tmp_path, monkeypatch):
    monkeypatch.setattr(download_plan, "_FILE_ROWS", 10)
    for part in range(3):
        write(tmp_path / f"in/{part}.parquet", [{"url": f"{part}-{i}"} for i in range(7)])
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    assert plan.rounds[0].files == [8, 8, 5] and plan.shards == 6 and plan.digits == 5
    assert [row["url"] for row in rows_of(plan)] == [f"{part}-{i}" for part in range(3) for i in range(7)]
    plan.rounds[0].files = [4 * 60_000]
    assert plan.digits == 6


def test_a_plan_is_finished_by_the_same_recipe_only(tmp_path):
    write(tmp_path / "in/a.parquet", [{"url": "u"}])
    prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    plan = Plan.load(tmp_path / "out")
    plan.require(recipe(tmp_path / "in"))
    with pytest.raises(ValueError, match="size 512, was 256"):
        plan.require(recipe(tmp_path / "in", size=512))
    assert Plan.load(tmp_path) is None


def test_shards_of_another_origin_are_left_alone(tmp_path):
    write(tmp_path / "in/a.parquet", [{"url": "u"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/00000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="another origin"):
        prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    assert (tmp_path / "out/00000.tar").read_bytes() == b"mine"


def test_failures_are_tried_again_once_a_round_and_counted_once(tmp_path):
    write(tmp_path / "in/a.parquet", [{"url": f"u{i}", "similarity": i / 8} for i in range(8)])
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    rows = rows_of(plan)
    messages = [
        None,
        "HTTP Error 404: Not Found",
        "timed out",
        "timed out",
        None,
        "Image decoding error",
        None,
        "what?",
    ]
    for number in range(2):
        finish(plan, number, list(zip(rows, messages, strict=True))[4 * number : 4 * number + 4])
    report = Fetched(plan).update().to_dict()
    assert (report["asked"], report["downloaded"], report["pending"], report["worth_another_try"]) == (8, 3, 0, 3)
    assert plan.add_round() == 3
    plan = Plan.load(tmp_path / "out")
    assert plan.shards == 3 and plan.rounds[1].retried == {"timeout": 2, "other": 1}
    assert rows_of(plan)[8:] == [rows[2], rows[3], rows[7]]
    assert Fetched(plan).update().to_dict()["pending"] == 3
    finish(plan, 2, [(rows[2], None), (rows[3], "timed out"), (rows[7], "HTTP Error 410: Gone")])
    report = Fetched(plan).update().to_dict()
    assert report["failed"] == {"http_404": 1, "no_image": 1, "timeout": 1, "http_410": 1}
    assert report["asked"] == 8 == report["downloaded"] + sum(report["failed"].values())
    assert plan.add_round() == 1 and rows_of(plan)[11:] == [rows[3]]
    finish(plan, 3, [(rows[3], None)])
    assert plan.add_round() == 0 and len(plan.rounds) == 3


@pytest.mark.parametrize("damage", ["no stats", "half stats", "cut tar", "cut parquet", "no tar"])
def test_a_shard_that_is_not_whole_is_removed(tmp_path, damage):
    write(tmp_path / "in/a.parquet", [{"url": f"u{i}"} for i in range(8)])
    plan = prepare(tmp_path / "out", recipe(tmp_path / "in"), NOTHING)
    for number in range(2):
        finish(plan, number, [(row, None) for row in rows_of(plan)[:4]])
    tar, parquet, stats = (plan.tar(1).with_name(f"00001{end}") for end in (".tar", ".parquet", "_stats.json"))
    if damage in ("no stats", "no tar"):
        (stats if damage == "no stats" else tar).unlink()
    elif damage == "cut tar":
        tar.write_bytes(bytes(2000) + b"x")
    else:
        victim = stats if damage == "half stats" else parquet
        victim.write_bytes(victim.read_bytes()[:40])
    (plan.input / "000001.parquet").write_bytes(b"of a round that was never planned")
    (plan.out / "_tmp").mkdir()
    assert plan.tidy() == [tar]
    assert sorted(path.name for path in plan.out.iterdir()) == [
        ".download", "00000.parquet", "00000.tar", "00000_stats.json"
    ]  # fmt: skip
    assert [path.name for path in plan.input.iterdir()] == ["000000.parquet"]
