#!/usr/bin/env bash
# Trains and measures what the README's tables show, on drawn data, and writes results/.
#
#   bash reproduce.sh            headline: TAL, LoGAH, GHN-3, w/o T.I., w/o ancestry, three seeds each (Tables 2 and 8)
#   bash reproduce.sh direct     the same network trained directly on as many images of each task (an upper bound)
#   bash reproduce.sh unseen     Table 5: tasks never tuned on, short training from TAL, LoGAH and random parameters
#   bash reproduce.sh data       contact sheet and difficulty table of the drawn tasks
#   SMOKE=1 bash reproduce.sh    the headline's commands on almost no data, to see that they run
#
# Two processes at a time (JOBS), one thread each. All stages resume when run again.
set -euo pipefail
cd "$(dirname "$0")"
part=${1:-headline}
seeds=${SEEDS:-0 1 2}
jobs=${JOBS:-2}
out=runs/headline
budget=(--pretrain-epochs "${PRETRAIN:-4}" --tune-epochs "${TUNE:-6}")
if [[ ${SMOKE:-} ]]; then out=runs/smoke; budget=(--pretrain-epochs 0.02 --tune-epochs 0.02 --ancestry-epochs 0.02); fi
mkdir -p results "$out"

start() {   # start NAME FLAGS...: runs in the background, at most $jobs at a time, output in $out/NAME/
    local name=$1; shift
    while (( $(jobs -rp | wc -l) >= jobs )); do wait -n; done
    local ancestry=(--ancestry "$out/ancestry/ancestry.pt")
    if [[ $name == ancestry ]]; then ancestry=(); fi
    mkdir -p "$out/$name" && rm -f "$out/$name/failed"
    (python tal.py --output "$out/$name" "${ancestry[@]}" "$@" > "$out/$name/$(date +%s).txt" 2> "$out/$name/errors.txt" && touch "$out/$name/done" ||
        { touch "$out/$name/failed"; echo "error: $name failed, see $out/$name/errors.txt" >&2; }) &
}

finish() { while (( $(jobs -rp | wc -l) )); do wait -n; done; }

case $part in
headline)
    start ancestry --stage ancestry "${budget[@]}"
    for seed in $seeds; do
        start "logah-s$seed" --stage evaluate --seed "$seed" --method logah "${budget[@]}"
        start "ghn3-s$seed" --stage evaluate --seed "$seed" --method ghn3 "${budget[@]}"
        until [[ -f "$out/ancestry/done" ]]; do [[ ! -f "$out/ancestry/failed" ]] || exit 1; sleep 1; done
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
data)
    python data.py --output results/contact_sheet.png
    python data.py --difficulty | tee results/difficulty.md ;;
*)
    echo "error: unknown part $part; headline, direct, unseen or data" >&2; exit 2 ;;
esac

python - "$out" "$part" <<'PY'
# Tables of results/ from what the runs wrote: mean over seeds, and the standard deviation between them.
import json, pathlib, statistics, sys
out, part = pathlib.Path(sys.argv[1]), sys.argv[2]

def spread(values):
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
PY
! find "$out" -name failed | grep -q .
