#!/usr/bin/env bash
# Trains and measures what the README's tables show, on drawn data, and writes results/.
#
#   bash reproduce.sh            headline: TAL, LoGAH, GHN-3, w/o T.I., w/o ancestry, three seeds each (Tables 2 and 8)
#   bash reproduce.sh direct     the same network trained directly on as many images of each task (an upper bound)
#   bash reproduce.sh unseen     Table 5: tasks never tuned on, short training from TAL, LoGAH and random parameters
#   bash reproduce.sh data       contact sheet and difficulty table of the drawn tasks
#   bash reproduce.sh adaptive   the second paper: its Tables 1-4, Figs. 3 and 4, and the checks on pool and selector
#   SMOKE=1 bash reproduce.sh    the headline's commands (or another part's) on almost no data, to see that they run
#
# Two processes at a time (JOBS), one thread each. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")"
part=${1:-headline}
seeds=${SEEDS:-0 1 2}
jobs=${JOBS:-2}
out=runs/headline
budget=(--pretrain-epochs "${PRETRAIN:-4}" --tune-epochs "${TUNE:-6}")
if [[ ${SMOKE:-} ]]; then out=runs/smoke; budget=(--pretrain-epochs 0.02 --tune-epochs 0.02 --ancestry-epochs 0.02); fi
mkdir -p results "$out"

launch() {   # launch NAME PROGRAM FLAGS...: runs in the background, at most $jobs at a time, output in $out/NAME/; once
    local name=$1; shift
    if grep -Fxqs -- "$*" "$out/$name/done"; then return; fi
    while (( $(jobs -rp | wc -l) >= jobs )); do wait -n; done
    mkdir -p "$out/$name" && rm -f "$out/$name/failed"
    (python "$@" --output "$out/$name" > "$out/$name/$(date +%s).txt" 2> "$out/$name/errors.txt" && echo "$*" >> "$out/$name/done" ||
        { touch "$out/$name/failed"; echo "error: $name failed, see $out/$name/errors.txt" >&2; }) &
}

start() {   # start NAME FLAGS...: tal.py under the shared ancestry
    local ancestry=(--ancestry "$out/ancestry/ancestry.pt")
    if [[ $1 == ancestry ]]; then ancestry=(); fi
    launch "$1" tal.py "${ancestry[@]}" "${@:2}"
}

after() {   # after NAME: waits until it is done
    until [[ -f $out/$1/done ]]; do [[ ! -f $out/$1/failed ]] || exit 1; sleep 1; done
}

finish() { while (( $(jobs -rp | wc -l) )); do wait -n; done; }

case $part in
headline)
    start ancestry --stage ancestry "${budget[@]}"
    for seed in $seeds; do
        start "logah-s$seed" --stage evaluate --seed "$seed" --method logah "${budget[@]}"
        start "ghn3-s$seed" --stage evaluate --seed "$seed" --method ghn3 "${budget[@]}"
        after ancestry
        start "tal-s$seed" --stage evaluate --seed "$seed" "${budget[@]}"
        start "no-task-info-s$seed" --stage evaluate --seed "$seed" --no-task-info "${budget[@]}"
        start "no-ancestry-s$seed" --stage evaluate --seed "$seed" --no-ancestry "${budget[@]}"
    done
    finish
    start "tal-s${seeds%% *}" --stage plot --seed "${seeds%% *}"
    finish
    if [[ ! ${SMOKE:-} && -f $out/tal-s${seeds%% *}/figure3.png ]]; then cp "$out/tal-s${seeds%% *}/figure3.png" results/; fi ;;
direct)
    for seed in $seeds; do start "direct-s$seed" --stage train --method random --seed "$seed" --train-images tune "${budget[@]}"; done
    finish ;;
unseen)
    for seed in $seeds; do
        for images in 4000 40000; do
            common=(--stage train --seed "$seed" --data clothing,faces,lesions --train-images "$images")
            start "random-s$seed/unseen-$images" --method random "${common[@]}"
            start "tal-s$seed" --fresh-head "${common[@]}"
            start "logah-s$seed" --method logah --source pretrain "${common[@]}"
            finish
        done
    done ;;
adaptive)
    out=runs/adaptive; few=(); near=kinds,variety,tail; six=$near,textures,aircraft,flowers
    if [[ ${SMOKE:-} ]]; then
        out=runs/adaptive-smoke; few=(--ancestry-epochs 0.05 --pretrain-epochs 0.02 --tleg-epochs 0.02 --select-steps 3); fi
    al() { launch "$1" adaptive_learngene.py "${few[@]}" "${@:2}" --select-samples 8 --select-lr 0.1; }      # the search of the committed run
    images() { if [[ ${SMOKE:-} ]]; then echo --train-images 128; else echo --train-images "$1"; fi; }
    baselines=scratch,prefine,heur,auto,peg,tleg,weight-selection
    # Ten class subsets of the wide task, one learngene each; beside them the ancestors of the baselines, on as many images.
    al source --stage pretrain --size drawn-small --method tleg,weight-selection
    for seed in $seeds; do al "small-s$seed" --seed "$seed"; done
    al domains --stream base:0-7,signs:0-15,textures:0-9,clothing:0-4 $([[ ${SMOKE:-} ]] || echo --ancestry-epochs 20)
    finish
    small() { echo --seed "$1" --pool "$out/small-s$1/pool" --source "$out/source"; }
    for seed in $seeds; do      # Table 1; "all" is for Table 4, "random" for Fig. 4
        al "table1-small-s$seed" --stage train $(small "$seed") --data "$six" --method "adaptive,all,$baselines" $(images 8000)
        al "table1-random-s$seed" --stage train $(small "$seed") --data "$near" --method random $(images 8000)
        for k in 1 2 3; do al "table4-$k-s$seed" --stage train $(small "$seed") --data "$near" --genes "$k" $(images 8000); done
        al "domains-s$seed" --stage select --seed "$seed" --pool "$out/domains/pool" --data signs:16-31,textures:10-19,clothing:5-9
    done
    for seed in $seeds; do al "tiny-s$seed" --seed "$seed" --size drawn-tiny; done
    al source --stage pretrain --size drawn-tiny --method tleg,weight-selection
    al swin --size drawn-swin --stream wide/5 $([[ ${SMOKE:-} ]] || echo --ancestry-epochs 5)
    finish
    # REINFORCE against the exhaustive search. Its samples and rate were chosen on the first seed's pool; this is the second's.
    other=$(awk '{ print $2 ? $2 : $1 }' <<< "$seeds")
    for seed in 0 1 2 3 4 5 6 7 8 9; do
        launch "search-s$seed" adaptive_learngene.py "${few[@]}" --stage select --seed "$seed" --size drawn-tiny --pool "$out/tiny-s$other/pool" --data kinds
    done
    finish
    for seed in 0 1 2 3 4 5 6 7 8 9; do
        al "search-s$seed" --stage select --seed "$seed" --size drawn-tiny --pool "$out/tiny-s$other/pool" --data kinds --search exhaustive
    done
    for seed in $seeds; do      # a single learngene, chosen by a short training of each, or at random
        al "trained-s$seed" --stage train $(small "$seed") --data "$near" --genes 1 --method adaptive,random --search exhaustive \
            --reward-head trained --reward-images 2500 $(images 8000)
    done
    for seed in $seeds; do
        al "figure3-s$seed" --stage train $(small "$seed") --data variety --method scratch,adaptive,prefine $(images 16000)
        al "table1-tiny-s$seed" --stage train --size drawn-tiny --seed "$seed" --pool "$out/tiny-s$seed/pool" --source "$out/source" \
            --data "$six" --method "adaptive,$baselines" $(images 4000)
        for depth in 3 6 9; do              # TALS looks at 1 % of this task, which are as many images as elsewhere
            al "table2-$depth-s$seed" --stage train $(small "$seed") --depth "$depth" --data wide --method scratch,peg,tleg,adaptive \
                --reward-share 0.01 $(images 8000)
        done
        al "table3-s$seed" --stage segment $(small "$seed") --data scenes --method scratch,prefine,heur,peg,adaptive $(images 4000)
        al "figure3-swin-s$seed" --stage train --seed "$seed" --size drawn-swin --pool "$out/swin/pool" --data variety --method scratch,adaptive $(images 8000)
        al "constrained-s$seed" --stage train $(small "$seed") --data "$near" --constrained $(images 8000)
    done
    # What becomes of learngenes that never had to stand alone, under every start.
    for init in delta block zero; do
        al "literal-$init" --init "$init" --gene-dropout 0 --stream "wide/10#1,wide/10#2,wide/10#3" $([[ ${SMOKE:-} ]] || echo --ancestry-epochs 5)
    done
    finish ;;
data)
    python data.py --output results/contact_sheet.png
    python data.py --difficulty | tee results/difficulty.md ;;
*)
    echo "error: unknown part $part; headline, direct, unseen, adaptive or data" >&2; exit 2 ;;
esac

python - "$out" "$part" <<'PY'
# Tables of results/ from what the runs wrote: mean over seeds, and the standard deviation between them.
import contextlib, json, pathlib, statistics, sys
out, part = pathlib.Path(sys.argv[1]), sys.argv[2]

def spread(values):
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

methods = {"tal": "TAL", "logah": "LoGAH", "ghn3": "GHN-3", "no-task-info": "TAL (w/o T.I.)", "no-ancestry": "TAL (w/o ancestry)"}
if part == "headline":
    tables = {m: [json.loads(p.read_text()) for p in sorted(out.glob(f"{m}-s*/untrained-evaluate-test.json"))] for m in methods}
    tables = {m: t for m, t in tables.items() if t}
    sizes = list(next(iter(tables.values()))[0])
    lines = ["| method | " + " | ".join(sizes) + " | mean of all sizes |", "|---" * (len(sizes) + 2) + "|"]
    for m, runs in tables.items():
        cells = [spread([r[s]["average"] for r in runs]) for s in sizes]
        lines.append(f"| {methods[m]} | " + " | ".join(cells) + " | " + spread([statistics.mean(r[s]["average"] for s in sizes) for r in runs]) + " |")
    tasks = [t for t in next(iter(tables.values()))[0][sizes[0]] if t != "average"]
    lines += ["", "| 6-Small | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for m, runs in tables.items():
        lines.append(f"| {methods[m]} | " + " | ".join(spread([r["6-Small"][t] for r in runs]) for t in tasks) + " |")
    (out.parent.parent / "results" / f"untrained{'-smoke' if out.name == 'smoke' else ''}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
elif part in ("direct", "unseen"):
    rows = {}
    for path in sorted(out.glob("**/log.jsonl")):
        for line in path.read_text().splitlines():
            r = json.loads(line)
            if r["stage"] == "train" and (part == "unseen") == (r["task"] in ("clothing", "faces", "lesions")):
                rows.setdefault((r["network"], r["images"], r["method"]), {}).setdefault(r["task"], {})[r["seed"]] = r["trained"]
    tasks = sorted({t for r in rows.values() for t in r})
    lines = ["| network | images | start | " + " | ".join(tasks) + " | average |", "|---" * (len(tasks) + 4) + "|"]
    for (network, images, method), by_task in sorted(rows.items()):
        seeds = sorted(set.intersection(*(set(by_task[t]) for t in tasks if t in by_task)))
        average = [statistics.mean(by_task[t][s] for t in by_task) for s in seeds]
        lines.append(f"| {network} | {images} | {method} | " + " | ".join(spread(list(by_task[t].values())) if t in by_task else "-" for t in tasks) + f" | {spread(average)} |")
    (out.parent.parent / "results" / f"{part}{'-smoke' if out.name == 'smoke' else ''}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
elif part == "adaptive":
    log = lambda pattern, stage: [r | {"run": p.parent.name} for p in sorted(out.glob(f"{pattern}/log.jsonl"))
                                  for r in map(json.loads, dict.fromkeys(p.read_text().splitlines())) if r["stage"] == stage]
    names = {"scratch": "From-Scratch", "prefine": "Pre-Fine (upper bound)", "heur": "Heur-Learngene", "auto": "Auto-Learngene", "peg": "PEG-style",
             "tleg": "TLEG", "weight-selection": "weight selection", "random": "Random-Select", "adaptive": "Adaptive-Learngene", "all": "all learngenes"}
    table = lambda head, rows: ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"] + ["| " + " | ".join(r) + " |" for r in rows]

    # The paper's own numbers, on its own data: means of Table 1's rows (Tiny, Small), Table 2's Small at 6, 9, 12 layers, Table 3.
    paper = {"scratch": (65.1, 72.6), "prefine": (79.9, 86.0), "heur": (70.9, 77.7), "auto": (75.9, 80.9), "peg": (79.7, 84.9), "adaptive": (80.5, 85.8)}
    paper2 = {"scratch": "64.9, 67.0, 68.6", "peg": "64.9, 69.5, 70.2", "tleg": "69.5, 73.2, 75.1", "adaptive": "70.2, 74.2, 75.9"}
    paper3 = {"prefine": 47.1, "heur": 40.1, "peg": 48.3, "adaptive": 55.6}

    def by_seed(records, key="accuracy"):            # mean within each seed (over random draws), in the order of the seeds
        seeds = sorted({r["seed"] for r in records})
        return [statistics.mean(r[key] for r in records if r["seed"] == s) for s in seeds]

    done, lines = log("table1-*", "train"), ["Drawn data, test split unless said otherwise; mean ± standard deviation between seeds."]
    tasks = list(dict.fromkeys(r["task"] for r in done))
    lines += ["", "## Table 1: six tasks, 8,000 images each (drawn-tiny: 4,000)"]
    rows = []
    for size in ("drawn-tiny", "drawn-small"):
        for m in [m for m in names if any((r["method"], r["size"]) == (m, size) for r in done)]:
            mine = [r for r in done if (r["method"], r["size"]) == (m, size)]
            cells = [by_seed([r for r in mine if r["task"] == t]) for t in tasks]
            rows.append([size, names[m]] + [spread(c) if c else "-" for c in cells] + [spread(by_seed(mine)) if all(cells) else "-", str(paper.get(m, ("-", "-"))[size == "drawn-small"])])
    lines += table(["size", "start", *tasks, "mean", "paper's mean"], rows)
    lines += ["", "## Table 2: depths, the wide task, 8,000 images (the ancestry has 6 layers)"]
    records = log("table2-*", "train")
    depths = sorted({r["depths"][0] for r in records})
    lines += table(["start", *map(str, depths), "paper's 6, 9, 12"], [
        [names[m]] + [spread(by_seed([r for r in records if (r["method"], r["depths"][0]) == (m, d)])) for d in depths] + [paper2[m]]
                                                  for m in dict.fromkeys(r["method"] for r in records)])
    lines += ["", "## Table 3: segmentation, mIoU after 4,000 images"]
    records = log("table3-*", "segment")
    lines += table(["start", "mIoU", "paper's"], [[names[m], spread(by_seed([r for r in records if r["method"] == m], "miou")), str(paper3.get(m, "-"))]
                                                  for m in dict.fromkeys(r["method"] for r in records)])
    lines += ["", "## Table 4: smallest number of learngenes that keeps 95 % of what all ten give (drawn-small)"]
    few, rows = log("table4-*", "train") + [r for r in done if r["method"] == "adaptive"], []
    for t in dict.fromkeys(r["task"] for r in log("table4-*", "train")):
        everything = {r["seed"]: r["accuracy"] for r in done if (r["method"], r["size"], r["task"]) == ("all", "drawn-small", t)}
        first = [min((r for r in few if (r["seed"], r["task"], r["size"]) == (s, t, "drawn-small") and r["accuracy"] >= 0.95 * a),
                     key=lambda r: len(r["learngenes"]), default=None) for s, a in everything.items()]
        kept = [r for r in first if r]
        rows.append([t, spread(list(everything.values())), ", ".join(str(len(r["learngenes"])) if r else "more" for r in first),
                     spread([r["accuracy"] for r in kept]) if kept else "-", ", ".join(f"{r['stored']:,}" for r in kept), ", ".join(f"{r['nominal']:,}" for r in kept),
                     f"{kept[0]['deployed']:,}" if kept else "-"])
    lines += table(["task", "all, %", "learngenes (per seed)", "these, %", "stored parameters", "the paper's k / N", "deployed"], rows)
    lines += ["", "## Fig. 3: images until scratch's last accuracy on val is reached, in shares of the run"]
    rows = []
    for pattern in ("figure3-s[0-9]*", "figure3-swin-s*"):
        records = log(pattern, "train")
        for m in dict.fromkeys(r["method"] for r in records):
            mine = [r for r in records if r["method"] == m]
            last = {r["seed"]: r["curve"][-1] for r in records if r["method"] == "scratch"}
            reach = [next((i + 1 for i, a in enumerate(r["curve"]) if a >= last[r["seed"]]), None) for r in mine]
            rows.append([mine[0]["size"], names[m], f"{mine[0]['images']:,}", ", ".join(f"{i}/{len(mine[0]['curve'])}" if i else "never" for i in reach), spread(by_seed(mine))])
    lines += table(["size", "start", "images", "per seed", "accuracy at the end"], rows)
    with contextlib.suppress(ImportError):           # the picture, where matplotlib is installed
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
        for axis, pattern in zip(axes, ("figure3-s[0-9]*", "figure3-swin-s*")):
            records = log(pattern, "train")
            for m in dict.fromkeys(r["method"] for r in records):
                curves = [r["curve"] for r in records if r["method"] == m]
                x = [records[0]["images"] * (i + 1) / len(curves[0]) for i in range(len(curves[0]))]
                axis.plot(x, [statistics.mean(c) for c in zip(*curves)], label=names[m])
                axis.fill_between(x, [min(c) for c in zip(*curves)], [max(c) for c in zip(*curves)], alpha=0.2)
            axis.set(title="ViT" if pattern == "figure3-s[0-9]*" else "Swin", xlabel="training images of variety", ylabel="accuracy on val, %"), axis.legend(fontsize=7)
        figure.tight_layout(), figure.savefig(out.parent.parent / "results" / "adaptive_figure3.png", dpi=130)
    lines += ["", "## Fig. 4: TALS against five random draws of as many learngenes (drawn-small)"]
    rows = []
    for t in dict.fromkeys(r["task"] for r in done if r["method"] == "random"):
        mine = [r for r in done if r["size"] == "drawn-small" and r["task"] == t]
        tals, draws = ({s: [r["accuracy"] for r in mine if (r["method"], r["seed"]) == (m, s)] for s in sorted({r["seed"] for r in mine})} for m in ("adaptive", "random"))
        gap = [tals[s][0] - statistics.mean(draws[s]) for s in tals]
        chosen = "; ".join(" ".join(map(str, r["learngenes"])) for r in mine if r["method"] == "adaptive")
        rows.append([t, chosen, spread([v[0] for v in tals.values()]), spread([statistics.mean(v) for v in draws.values()]),
                     f"{statistics.mean(statistics.stdev(v) for v in draws.values() if len(v) > 1):.1f}", ", ".join(f"{g:+.1f}" for g in gap),
                     f"{sum(a < v[0] for s, v in tals.items() for a in draws[s])} of {sum(map(len, draws.values()))}"])
    lines += table(["task", "TALS selects (per seed)", "TALS", "mean of draws", "deviation between draws", "TALS - mean, per seed", "draws below TALS"], rows)
    lines += ["", "## A single learngene, chosen three ways (drawn-small, 8,000 images)"]
    one = {"class means": log("table4-1-*", "train"), "training each on 2,500 images": [r for r in log("trained-*", "train") if r["method"] == "adaptive"],
           "at random (mean of five draws)": [r for r in log("trained-*", "train") if r["method"] == "random"]}
    lines += table(["chosen by", *tasks[:3]], [[how] + [spread(by_seed([r for r in records if r["task"] == t])) for t in tasks[:3]] for how, records in one.items()])
    lines += ["", "## Both ways to train on (8,000 images, drawn-small)"]
    records = [r for r in done if (r["method"], r["size"]) == ("adaptive", "drawn-small")] + log("constrained-*", "train")
    rows = [[("constrained" if c else "initialise only")] + [spread(by_seed([r for r in records if (r["constrained"], r["task"]) == (c, t)])) for t in tasks[:3]] +
            [", ".join(f"{r['trainable']:,}" for r in records if r["constrained"] == c and r["task"] == tasks[0])] for c in (False, True)]
    lines += table(["", *tasks[:3], f"trainable parameters ({tasks[0]}, per seed)"], rows)
    lines += ["", "## The pool (val)"]
    rows = []
    for p in sorted(p.parent.name for p in out.glob("*/pool") if log(p.parent.name, "alone")):
        alone, own = log(p, "alone")[-1]["table"], {r["learngene"]: r for r in log(p, "pool")}
        best = sum(max(range(len(alone) - 1), key=lambda n: alone[n][d]) == d for d in range(len(alone[0])))
        rows.append([p, f"{statistics.mean(r['val'] for r in own.values()):.1f}", f"{sum(r['kept'] for r in own.values())} of {sum(r['earlier'] for r in own.values())}",
                     f"{min(map(statistics.mean, alone[:-1])):.1f} to {max(map(statistics.mean, alone[:-1])):.1f}", f"{statistics.mean(alone[-1]):.1f}", f"{best} of {len(alone[0])}"])
    lines += table(["pool", "own dataset, %", "earlier logits unchanged", "learngenes alone, class means, %", "untrained network", "datasets whose own learngene is the best alone"], rows)
    lines += ["", "## Three learngenes that learned without gene-dropout, each alone: class means on the three datasets (val), %"]
    lines += table(["start", "1", "2", "3", "untrained network"], [
        [p.parent.name.removeprefix("literal-")] + [f"{statistics.mean(row):.1f}" for row in log(p.parent.name, "alone")[-1]["table"]]
        for p in sorted(out.glob("literal-*/log.jsonl")) if log(p.parent.name, "alone")])
    lines += ["", "## REINFORCE against exhaustive search (kinds, drawn-tiny, ten seeds)"]
    found = {r["seed"]: r for r in log("search-*", "select") if r["search"] == "reinforce"}
    best = {r["seed"]: r for r in log("search-*", "select") if r["search"] == "exhaustive"}
    lines += table(["seed", "TALS", "reward", "optimum", "reward", "gap", "subsets looked at"], [
        [str(s), " ".join(map(str, found[s]["learngenes"])), f"{found[s]['reward']:.4f}", " ".join(map(str, best[s]["learngenes"])), f"{best[s]['reward']:.4f}",
         f"{best[s]['reward'] - found[s]['reward']:.4f}", str(found[s]["visited"])] for s in sorted(best)])
    lines += ["", "## A stream of domains: held-out classes of a domain, learngenes ranked by their reward alone"]
    lines += table(["task", "ranking (per seed)", "TALS selects", "accuracy of the reward head", "chance"], [
        [t, "; ".join(" ".join(sorted(r["singles"], key=lambda n: -r["singles"][n])) for r in mine), "; ".join(" ".join(map(str, r["learngenes"])) for r in mine),
         spread([r["accuracy"] for r in mine]), f"{mine[0]['chance']:.1f}"]
        for t in dict.fromkeys(r["task"] for r in log("domains-s*", "select")) for mine in [[r for r in log("domains-s*", "select") if r["task"] == t]]])
    (out.parent.parent / "results" / f"adaptive{'-smoke' if out.name.endswith('smoke') else ''}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
PY
! find "$out" -name failed | grep -q .
