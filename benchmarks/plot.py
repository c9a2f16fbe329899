"""Plots and tables in docs/ from the results: docs/loading.svg, docs/shuffle.svg, and the tables between markers.

.venv-peers/bin/python -m benchmarks.plot        # needs matplotlib
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
OURS, GREY, BLUE, LIGHT = "#c0392b", "#555555", "#2c6fad", "#9cc3e6"
CLASSES = {"640x480": "640x480-class", "336": "336-class"}


def results(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(figure: Any, name: str) -> None:
    """As SVG that is the same for the same results."""
    figure.savefig(DOCS / name, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    print(f"docs/{name}")


def plot_loading(loading: dict[str, Any]) -> None:
    classes = [name for name in CLASSES if name in loading]
    figure, axes = plt.subplots(1, len(classes), figsize=(5.5 * len(classes), 4.6), squeeze=False)
    for axis, name in zip(axes[0], classes, strict=True):
        medians = dict(sorted(loading[name]["median"].items(), key=lambda item: item[1]))
        colours = [_colour(contender) for contender in medians]
        bars = axis.barh(list(medians), list(medians.values()), color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axis.set_title(f"{CLASSES[name]} photographs", fontsize=10)
        axis.set_xlabel("samples/s", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, "loading.svg")


def _colour(contender: str) -> str:
    if contender == "kernel alone":
        return GREY
    if contender == "StreamingLoader":
        return OURS
    return LIGHT if contender.endswith(", Pillow") else BLUE


def plot_shuffle(found: dict[str, Any]) -> None:
    shown = {
        "full": GREY,
        "block (default)": OURS,
        "webdataset, buffer of 1,000": BLUE,
        "MosaicML py1e, 2^18": "#e0a030",
        "MosaicML py1s": "#3a9d5d",
    }
    shown = {name: colour for name, colour in shown.items() if name in found["orders"]}
    figure, (near, places) = plt.subplots(1, 2, figsize=(11, 4.2))
    expected = found["uniform"]["next_neighbours"]
    for name, colour in shown.items():
        curve = {int(d): share for d, share in found["orders"][name]["neighbours_within"].items() if share}
        near.loglog(list(curve), list(curve.values()), color=colour, label=name)
    near.loglog([1, 1 << 16], [expected, expected * (1 << 16)], color="black", linewidth=0.8, linestyle=":")
    near.set_xlabel("next samples on the rank", fontsize=9)
    near.set_title("how many of them were stored in the same 32 (dotted: uniform)", fontsize=10)
    near.legend(fontsize=8)
    for row, (name, colour) in enumerate(shown.items()):
        # one path of many strokes, which makes a smaller file than as many marks
        at = [x / found["samples"] for x in found["orders"][name]["a_quarter_in"][::2] for _ in range(3)]
        places.plot(at, [row - 0.3, row + 0.3, math.nan] * (len(at) // 3), color=colour, linewidth=0.5)
    places.set_yticks(range(len(shown)), list(shown), fontsize=8)
    places.invert_yaxis()
    places.set_xlim(0, 1)
    places.set_xlabel("place in the data set", fontsize=9)
    places.set_title("where 16 global batches in a row come from, a quarter into the epoch", fontsize=10)
    for axis in (near, places):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, "shuffle.svg")


def loading_table(loading: dict[str, Any]) -> str:
    """Median rates with their ratios to the kernel's, and the ratios that count."""
    classes = [name for name in CLASSES if name in loading]
    rows = ["| samples/s (over the kernel) | " + " | ".join(CLASSES[name] for name in classes) + " |"]
    rows.append("|---|" + "---|" * len(classes))
    for contender in loading[classes[0]]["median"]:
        cells = []
        for name in classes:
            rates = [each[contender] / each["kernel alone"] for each in loading[name]["rounds"]]
            cells.append(f"{loading[name]['median'][contender]:,.0f} ({statistics.median(rates):.2f})")
        rows.append(f"| {contender} | " + " | ".join(cells) + " |")
    rows += ["", "| StreamingLoader over | " + " | ".join(CLASSES[name] for name in classes) + " |"]
    rows.append("|---|" + "---|" * len(classes))
    for key in loading[classes[0]]["ratios"]:
        cells = [
            f"{(ratio := loading[name]['ratios'][key])['ratio']:.2f}"
            + ("" if ratio["over"] == key else f" ({ratio['over'].rpartition(',')[0]})")
            for name in classes
        ]
        rows.append(f"| {key} | " + " | ".join(cells) + " |")
    kernel = " and ".join(f"{loading[name]['kernel_milliseconds']:.2f} ms" for name in classes)
    rows += ["", f"The kernel takes {kernel} a sample and core."]
    rows += ["", "![Samples a second of each loader](loading.svg)"]
    return "\n".join(rows)


def raw_table(raw: dict[str, Any]) -> str:
    classes = [name for name in CLASSES if name in raw]
    rows = ["| samples/s (StreamingLoader over it) | " + " | ".join(CLASSES[name] for name in classes) + " |"]
    rows.append("|---|" + "---|" * len(classes))
    for contender in raw[classes[0]]["median"]:
        cells = []
        for name in classes:
            ratio = raw[name]["ratios"].get(contender, {"ratio": 1.0})["ratio"]
            cells.append(f"{raw[name]['median'][contender]:,.0f} ({ratio:.1f})")
        rows.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def shuffle_table(found: dict[str, Any]) -> str:
    columns = {
        "batch_neighbours": "pairs of a rank's batch",
        "global_batch_neighbours": "pairs of a global batch",
        "correlation": "correlation",
        "displacement_ks": "displacement, KS",
        "chi_square_batch": "chi-square, rank's batch",
        "chi_square_global_batch": "global batch",
        "chi_square_window": "32 global batches",
        "open_share": "open",
    }
    rows = ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for name, measures in (*found["orders"].items(), ("uniform", found["uniform"])):
        rows.append(f"| {name} | " + " | ".join(_cell(column, measures) for column in columns) + " |")
    return "\n".join(rows)


def _cell(column: str, measures: dict[str, float]) -> str:
    value = measures.get(column)
    if value is None:
        return ""
    if column.endswith("neighbours") or column == "open_share":
        return f"{100 * value:.2g} %" if value < 0.995 else "100 %"
    return (
        f"{value:.3f}"
        if column in ("correlation", "displacement_ks")
        else f"{value:,.2f}"
        if value < 10
        else f"{value:,.0f}"
    )


def planning_table(found: dict[str, Any]) -> str:
    rows = [
        "| | microseconds a sample | of that, order and shards | MB beyond a window's |",
        "|---|---|---|---|",
    ]
    for name, plan in found["plans"].items():
        median = plan["median"]
        rows.append(
            f"| {name} | {median['microseconds']:.2f} | {median['order_microseconds']:.2f} | {median['megabytes']:.0f} |"
        )
    return "\n".join(rows)


def resume_table(found: dict[str, Any]) -> str:
    """Medians of the milliseconds, all and those without forking, and of the ratios inside the rounds."""
    rows = [
        "| first batch, ms (without forking) | cold | in mid-epoch | ratio | opening before, ms |",
        "|---|---|---|---|---|",
    ]
    for name, plan in found["plans"].items():
        times = [
            f"{plan[kind]['first batch']:,.0f} ({plan[kind]['without forking']:,.0f})"
            for kind in ("cold", "resumed")
        ]
        ratio = f"{plan['ratio']:.2f} ({plan['ratio without forking']:.2f})"
        opening = f"{plan['cold']['open']:,.0f} and {plan['resumed']['open']:,.0f}"
        rows.append(f"| {name} | {' | '.join(times)} | {ratio} | {opening} |")
    return "\n".join(rows)


def memory_table(found: dict[str, Any]) -> str:
    processes = ("main", "worker 0", "worker 1")
    rows = ["| RssAnon, MB | " + " | ".join(processes) + " |", "|---|" + "---|" * len(processes)]
    for plans, told in (
        ("epochs", "{}, after 2 and {} epochs"),
        ("data sets", "{}, 10^5 and 10^7 samples"),
    ):
        for name, plan in found[plans].items():
            cells = [
                f"{plan[each]['before'] / 1e6:.1f}, {plan[each]['after'] / 1e6:.1f} ({plan[each]['growth']:+.1%})"
                for each in processes
            ]
            count = len(plan.get("every epoch", ()))
            rows.append(f"| {told.format(name, count)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def remote_table(found: dict[str, Any]) -> str:
    speed = statistics.median(each["remote"] / each["local"] for each in found["rounds"])
    values = {
        "samples/s over local files": (f"{speed:.2f}", "at least 0.9"),
        "processor time a sample, remote over local": (
            f"{found['processor_time_over_local']:.2f}",
            "at most 1.1",
        ),
        "bytes fetched over bytes used, no cache kept": (
            f"{found['fetched_over_used']:.3f}",
            "at most 1.05",
        ),
        "requests a sample": (f"{found['requests_per_sample']:.3f}", "at most 0.0625"),
        "bytes fetched over used in the second epoch, with a cache of 25 % of the data": (
            f"{found['second_epoch_cache_25_percent_fetched_over_used']:.2f}",
            "at most 0.9",
        ),
    }
    rows = ["| | measured | wanted |", "|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| {name} | {value} | {wanted} |" for name, (value, wanted) in values.items())]
    )


def text_table(found: dict[str, Any]) -> str:
    alone, within = found["alone"], found["within the loader"]
    sizes = {"short": "short", "one exchange": "one", "two exchanges": "two"}
    rows = [
        "| microseconds a record | "
        + " | ".join(f"{alone['bytes'][size]:,} bytes" for size in sizes.values())
        + " |"
    ]
    rows.append("|---|" + "---|" * len(sizes))
    names = dict.fromkeys(name.rpartition(", ")[0] for name in alone["median"])
    for name in names:
        cells = [alone["median"].get(f"{name}, {size}") for size in sizes]
        rows.append(
            f"| {name} | " + " | ".join("" if cell is None else f"{cell:,.0f}" for cell in cells) + " |"
        )
    rows += [
        "",
        (
            f"Within the loader, records of {within['bytes']:,} bytes beside a picture at 336 crop, SentencePiece, `v1`: text adds {within['adds']:.1%} "
            f"(at most {within['at_most']:.0%})."
        ),
    ]
    return "\n".join(rows)


def packing_table(found: dict[str, Any]) -> str:
    rows = ["| | samples/s | over `tar cf` |", "|---|---|---|"]
    for name, rate in found["median"].items():
        ratio = statistics.median(each[name] / each["tar cf"] for each in found["rounds"])
        rows.append(f"| {name} | {rate:,.0f} | {ratio:.2f} |")
    wanted = {
        "one worker over tar cf": 0.8,
        "one worker over ShardWriter": 3,
        "two workers over one": 1.4,
        "zip over folder": 1,
    }
    rows += ["", "| | ratio | wanted, at least |", "|---|---|---|"]
    return "\n".join(
        [*rows, *(f"| {name} | {found['ratios'][name]:.2f} | {least} |" for name, least in wanted.items())]
    )


def index_table(found: dict[str, Any]) -> str:
    rows = ["| | webdataset, iterating | `shardify index` | ratio |", "|---|---|---|---|"]
    for name in ("photographs", "thumbnails"):
        medians, ratio = found[name]["median"], found[name]["ratios"]["index over webdataset"]
        rows.append(
            f"| {name} | {medians['webdataset']:,.0f} samples/s | {medians['shardify index']:,.0f} | {ratio:.1f} |"
        )
    return "\n".join(rows)


def put(path: Path, marker: str, table: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- end -->`."""
    text = path.read_text()
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = pattern.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if not count:
        raise SystemExit(f"{path}: no <!-- {marker} --> ... <!-- end -->")
    path.write_text(changed)
    print(f"{path.relative_to(ROOT)}: {marker}")


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "shardify"
    if loading := results("loading"):
        plot_loading(loading)
        put(DOCS / "performance.md", "loading", loading_table(loading))
    if raw := results("raw"):
        put(DOCS / "performance.md", "raw", raw_table(raw))
    if shuffle := results("shuffle"):
        plot_shuffle(shuffle["orders"])
        put(DOCS / "order.md", "shuffle", shuffle_table(shuffle["orders"]))
    tables = {
        "planning": planning_table,
        "resume": resume_table,
        "memory": memory_table,
        "remote": remote_table,
        "text": text_table,
    }
    for name, table in tables.items():
        if found := results(name):
            put(DOCS / "performance.md", name, table(found))
    packing = results("pack")
    if "photos" in packing:
        put(DOCS / "performance.md", "packing", packing_table(packing["photos"]))
    if "index" in packing:
        put(DOCS / "performance.md", "index", index_table(packing["index"]))


if __name__ == "__main__":
    main()
