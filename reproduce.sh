#!/usr/bin/env bash
# Every table and figure of both papers, and which of their claims hold: trains, measures, writes results/.
#
#   bash reproduce.sh                      everything, on drawn data: nothing is downloaded, two CPU cores are enough
#   bash reproduce.sh tal-2 al-4           only these, and what they need
#   bash reproduce.sh --dry-run [PART...]  lists the commands and how long they take, runs none
#   SMOKE=1 bash reproduce.sh [PART...]    the same commands on almost no data, to see that they run
#   DATA=/data ANCESTRY=vit_base.safetensors bash reproduce.sh paper [PART...]
#                                          the papers' datasets and settings: GPU-weeks, see "In full" in the README
#
# Parts: tal-1 ... tal-9 tal-fig3, al-1 ... al-4 al-fig3 al-fig4 (the papers' tables and figures, "al" being Adaptive-Learngene),
#        alternatives (what else the same cost buys), al-pool (checks on pool and selector that no table shows; only when named),
#        data (contact sheet and difficulty of the drawn tasks; only when named).
#
# Two commands at a time (JOBS=2), one thread each. Run again, it goes on where it was stopped; what two tables share is made once.
# To stay below two hours on two cores, only TAL and LoGAH, and Adaptive-Learngene and its baselines at Small, have three seeds (SEEDS);
# other baselines, ablations and sizes, text, segmentation and Swin have one (ONCE), and al-pool is left out. ONCE="0 1 2" repeats all.
set -euo pipefail
cd "$(dirname "$0")"
mode=drawn dry='' parts=()
for word in "$@"; do case $word in --dry-run) dry=1 ;; paper) mode=paper ;; *) parts+=("$word") ;; esac; done
if [[ ${SMOKE:-} ]]; then mode=smoke; fi
out=runs/$mode
if [[ $mode == paper ]]; then seeds=${SEEDS:-0} jobs=${JOBS:-1}; else seeds=${SEEDS:-0 1 2} jobs=${JOBS:-2}; fi
once=${ONCE:-${seeds%% *}}

# ----------------------------------------------------------------------------------------------------------------------
# Settings: what the drawn data, the papers' data and a smoke test differ in
# ----------------------------------------------------------------------------------------------------------------------

nine=aircraft,objects,pedestrian,textures,signs,glyphs,digits,motion,flowers base=base few=() tail=()
near=kinds,variety,tail six=kinds,variety,tail,textures,aircraft,flowers curve=variety wide=wide scenes=scenes unseen=clothing,faces,lesions
tiny=drawn-tiny small=drawn-small swin=drawn-swin depths="3 6 9"
common=(--ancestry "$out/ancestry/ancestry.pt") budget=(--pretrain-epochs 4 --tune-epochs 6)
texts=() text_tasks="paraphrases acceptability entailment sentiment" text_epochs=(6 15) gpt2=$out/text-ancestry/ancestry.pt
tail=(--select-samples 8 --select-lr 0.1)                                 # the search of the committed run; the default became better
if [[ $mode == smoke ]]; then
    budget=(--pretrain-epochs 0.02 --tune-epochs 0.02 --ancestry-epochs 0.02)
    few=(--ancestry-epochs 0.05 --pretrain-epochs 0.02 --tleg-epochs 0.02 --select-steps 3) texts=(--ancestry-epochs 0.02) text_epochs=(0.02 0.05)
elif [[ $mode == paper ]]; then
    : "${DATA:?the folder of the real datasets}" "${ANCESTRY:?a pretrained ViT-Base for TAL (--ancestry)}"
    gpt2=${GPT2:-$DATA/gpt2}/model.safetensors text_epochs=(100 250) text_tasks="mrpc cola rte imdb"
    texts=(--preset paper --data-dir "$DATA" --tokens "${gpt2%/*}")        # gpt2's model.safetensors, vocab.json, merges.txt
    common=(--preset paper --data-dir "$DATA" --ancestry "$ANCESTRY") budget=() few=(--preset paper --data-dir "$DATA") tail=()
    nine=$(printf 'decathlon/%s,' aircraft cifar100 daimlerpedcls dtd gtsrb omniglot svhn ucf101 vgg-flowers); nine=${nine%,}
    near=cifar10,cifar100,food101 six=cifar100,cifar10,food101,cars,flowers102-trainval curve=cifar100 wide=imagenet scenes=ade20k
    unseen=fashion-mnist,fer2013,ham10000 base=imagenet tiny=tiny small=small swin=swin-tiny depths="6 9 12"
fi

train() {   # train IMAGES EPOCHS: how long a network trains, in images on drawn data, in epochs in the paper
    case $mode in drawn) echo "--train-images $1" ;; smoke) echo "--train-images 128" ;; paper) echo "--train-epochs $2" ;; esac
}

# ----------------------------------------------------------------------------------------------------------------------
# The cells. A cell is a command with a folder of its own, $out/NAME; minutes are those of one core (AMD EPYC)
# ----------------------------------------------------------------------------------------------------------------------

names=() minutes=() needs=() commands=()

cell() {    # cell MINUTES "NEEDED CELLS" NAME PROGRAM FLAGS...; cells of one name run one after another
    local i
    for i in "${!names[@]}"; do if [[ ${names[i]} == "$3" && ${commands[i]} == "${*:4}" ]]; then return; fi; done
    minutes+=("$([[ $mode == drawn ]] && echo "$1" || echo 0)") needs+=("$2") names+=("$3") commands+=("${*:4}")
}

tal() { cell "$1" "$2" "$3" tal.py "${common[@]}" "${@:4}"; }             # under the shared ancestry
al() { cell "$1" "$2" "$3" adaptive_learngene.py "${few[@]}" "${@:4}" "${tail[@]}"; }

ancestry() { if [[ $mode != paper ]]; then cell 3.5 "" ancestry tal.py --stage ancestry "${budget[@]}"; fi; }

repeats() { case $1 in tal | logah) echo "$seeds" ;; *) echo "$once" ;; esac; }     # of METHOD: its seeds

untrained() {   # untrained METHOD...: pretrained, tuned, measured without training: 96,000 and 294,000 images
    local method seed
    ancestry
    for method in "$@"; do
        for seed in $(repeats "$method"); do
            case $method in
            tal) tal 6 ancestry "tal-s$seed" --stage evaluate --seed "$seed" "${budget[@]}" ;;
            tal+) tal 8 ancestry "tal+-s$seed" --stage evaluate --seed "$seed" --method tal+ "${budget[@]}" ;;
            logah) tal 4.8 "" "logah-s$seed" --stage evaluate --seed "$seed" --method logah "${budget[@]}" ;;
            ghn3) tal 6.6 "" "ghn3-s$seed" --stage evaluate --seed "$seed" --method ghn3 "${budget[@]}" ;;
            no-*) tal 5.5 ancestry "$method-s$seed" --stage evaluate --seed "$seed" "--$method" "${budget[@]}" ;;
            esac
        done
    done
}

pools() {   # pools SIZE SEEDS: ten class subsets of the wide task, one learngene each, 40,000 images seen of each
    local seed size=${1#drawn-}
    for seed in $2; do
        if [[ $1 == "$small" ]]; then al 5.5 "" "$size-s$seed" --seed "$seed"; else al 3 "" "$size-s$seed" --seed "$seed" --size "$1"; fi
    done
}

source_of() {   # source_of SIZE: the ancestors of the baselines, on as many images as a pool; in one folder, one after another
    al "$([[ $1 == "$small" ]] && echo 18 || echo 5.5)" "" source --stage pretrain --size "$1" --method "tleg$([[ $1 == base ]] || echo ,weight-selection)"
}

of() { echo --seed "$1" --pool "$out/small-s$1/pool" --source "$out/source"; }     # of SEED: its pool and the baselines' ancestors

table() {   # table PART: the cells of a table or figure
    local seed method size task images epochs cost name flags k depth init net nets
    case $1 in
    tal-1)  # the base task: untrained as pretrained, then trained on
        untrained ghn3 logah tal tal+
        for method in ghn3 logah tal tal+; do for seed in $(repeats "$method"); do
            if [[ $method == tal ]]; then flags=(); else flags=(--method "$method"); fi
            tal 0.4 "" "$method-s$seed" --stage pretrain --seed "$seed" "${flags[@]}" "${budget[@]}"
        done; done
        for seed in $once; do for method in ghn3 logah tal tal+; do for size in "$tiny" "$small"; do
            tal 0.6 "" "$method-s$seed" --stage train --source pretrain --seed "$seed" --method "$method" --data "$base" --size "$size" --depth 12 \
                $(train 8000 75)
        done; done; done ;;
    tal-2) untrained ghn3 logah tal tal+ ;;
    tal-3)  # the nine tasks, trained on; random parameters twice as long
        untrained ghn3 logah tal tal+
        for size in "$small" "$tiny"; do for method in random ghn3 logah tal tal+; do
            for seed in $([[ $size == "$tiny" ]] && echo "$once" || repeats "${method/random/tal}"); do
                name=$method-s$seed cost=0.8 images=2000 epochs=100
                if [[ $method == random ]]; then name+=/trained cost=1.2 images=4000 epochs=200; fi
                tal $cost "" "$name" --stage train --seed "$seed" --method "$method" --data "$nine" --size "$size" --depth 12 $(train $images $epochs)
            done
        done; done ;;
    tal-4) untrained ghn3 logah tal tal+ ;;                               # training time: what these log
    tal-5)  # unseen tasks, a short and a long training, one rate and a fresh head for all
        untrained logah tal
        nets=("") && if [[ $mode == paper ]]; then nets=("--size tiny --depth 3" "--size small --depth 6"); fi
        for images in 4000 40000; do for seed in $seeds; do for net in "${nets[@]}"; do
            cost=$([[ $images == 4000 ]] && echo 0.2 || echo 0.9)
            flags=(--stage train --seed "$seed" --data "$unseen" $(train $images $((images == 4000 ? 5 : 100))) $net)
            tal $cost "" "random-s$seed/unseen-$images" --method random "${flags[@]}"
            tal $cost "" "tal-s$seed" --fresh-head "${flags[@]}"
            tal $cost "" "logah-s$seed" --method logah --source pretrain "${flags[@]}"
        done; done; done ;;
    tal-6)  # text: one TAL for all four tasks; one LoGAH for each, as long, and as the paper has it 2.5 times as long; training from random parameters
        if [[ $mode != paper ]]; then cell 6 "" text-ancestry tal.py --modality text --stage ancestry "${texts[@]}"; fi
        for seed in $once; do
            flags=(--modality text --stage evaluate --seed "$seed" "${texts[@]}")
            cell 6 text-ancestry "text-tal-s$seed" tal.py "${flags[@]}" --ancestry "$gpt2" --tune-epochs "${text_epochs[0]}"
            for task in $text_tasks; do
                cell 1 "" "text-logah-equal-$task-s$seed" tal.py "${flags[@]}" --method logah --tune-tasks "$task" --tune-epochs "${text_epochs[0]}"
                cell 2.3 "" "text-logah-$task-s$seed" tal.py "${flags[@]}" --method logah --tune-tasks "$task" --tune-epochs "${text_epochs[1]}"
            done
        done
        flags=(--modality text --stage train --method random --seed "${seeds%% *}" --data "${text_tasks// /,}" "${texts[@]}" $(train 60000 100))
        cell 3.2 "" "text-random-s${seeds%% *}" tal.py "${flags[@]}" ;;
    tal-7)  # from the same pretraining, tuned on one task alone
        untrained tal
        for seed in $once; do for task in ${nine//,/ }; do
            tal 0.8 "tal-s$seed" "st-${task#*/}-s$seed" --stage evaluate --seed "$seed" --tune-tasks "$task" "${budget[@]}"
        done; done ;;
    tal-8 | tal-9) untrained no-task-info no-ancestry tal ;;
    tal-fig3)
        untrained tal
        for seed in $seeds; do tal 0.2 "" "tal-s$seed" --stage plot --seed "$seed"; done ;;
    al-1)
        pools "$small" "$seeds"; source_of "$small"; pools "$tiny" "$once"; source_of "$tiny"
        for seed in $seeds; do                                           # "all" is for Table 4
            al 7.5 "small-s$seed source" "table1-small-s$seed" --stage train $(of "$seed") --data "$six" \
                --method adaptive,all,scratch,prefine,heur,auto,peg,tleg,weight-selection $(train 8000 500)
        done
        for seed in $once; do
            al 3.3 "tiny-s$seed source" "table1-tiny-s$seed" --stage train --size "$tiny" --seed "$seed" --pool "$out/tiny-s$seed/pool" --source "$out/source" \
                --data "$six" --method adaptive,scratch,prefine,heur,auto,peg,tleg,weight-selection $(train 4000 500)
        done
        if [[ $mode == paper ]]; then
            for seed in $once; do for size in small tiny; do
                al 0 "$size-s$seed source" "table1-$size-s$seed" --stage train --size "$size" --seed "$seed" --pool "$out/$size-s$seed/pool" --source "$out/source" \
                    --data inaturalist2019 --method adaptive,all,scratch,prefine,heur,auto,peg,tleg --train-epochs 100
            done; done
        fi ;;
    al-2)   # TALS looks at 1 % of this task, which are as many images as elsewhere
        pools "$small" "$once"; source_of "$small"
        for seed in $once; do for depth in $depths; do
            al 1.1 "small-s$seed source" "table2-$depth-s$seed" --stage train $(of "$seed") --depth "$depth" --data "$wide" --method scratch,peg,tleg,adaptive \
                --reward-share 0.01 $(train 8000 50)
        done; done
        if [[ $mode == paper ]]; then
            for size in tiny base; do pools "$size" "$once"; source_of "$size"; done
            for seed in $once; do for net in tiny:6 tiny:9 tiny:12 base:6 base:7 base:8 base:9 base:10 base:12; do
                al 0 "${net%:*}-s$seed source" "table2-${net/:/-}-s$seed" --stage train --size "${net%:*}" --seed "$seed" --pool "$out/${net%:*}-s$seed/pool" \
                    --source "$out/source" --depth "${net#*:}" --data "$wide" --method scratch,peg,tleg,adaptive --reward-share 0.01 --train-epochs 50
            done; done
        fi ;;
    al-3)
        pools "$small" "$once"; source_of "$small"
        for seed in $once; do
            al 1.7 "small-s$seed source" "table3-s$seed" --stage segment $(of "$seed") --data "$scenes" --method scratch,prefine,heur,peg,adaptive $(train 4000 50)
        done ;;
    al-4)   # the smallest selections; Table 1 has the largest
        table al-1
        for seed in $seeds; do for k in 1 2 3; do
            al 0.7 "small-s$seed" "table4-$k-s$seed" --stage train $(of "$seed") --data "$near" --genes "$k" $(train 8000 100)
        done; done ;;
    al-fig3)
        pools "$small" "$seeds"; source_of "$small"
        if [[ $mode == paper ]]; then al 0 "" swin --size "$swin"; else
            al 3.2 "" swin --size "$swin" --stream wide/5 $([[ $mode == smoke ]] || echo --ancestry-epochs 5); fi
        for seed in $seeds; do
            al 1.2 "small-s$seed source" "figure3-s$seed" --stage train $(of "$seed") --data "$curve" --method scratch,adaptive,prefine $(train 16000 300)
        done
        for seed in $once; do
            al 1 swin "figure3-swin-s$seed" --stage train --seed "$seed" --size "$swin" --pool "$out/swin/pool" --data "$curve" --method scratch,adaptive \
                $(train 8000 300)
        done ;;
    al-fig4)
        table al-1
        for seed in $seeds; do
            al 2.6 "small-s$seed source" "table1-random-s$seed" --stage train $(of "$seed") --data "$near" --method random $(train 8000 100)
        done ;;
    al-pool)
        # REINFORCE against the exhaustive search. Its samples and rate were chosen on the first seed's pool; this is the second's.
        other=$(awk '{ print $2 ? $2 : $1 }' <<< "$seeds")
        pools "$tiny" "$other"; pools "$small" "$seeds"
        for seed in 0 1 2 3 4 5 6 7 8 9; do
            flags=(--stage select --seed "$seed" --size "$tiny" --pool "$out/tiny-s$other/pool" --data "${near%%,*}")
            cell 0.3 "tiny-s$other" "search-s$seed" adaptive_learngene.py "${few[@]}" "${flags[@]}"
            al 0.4 "tiny-s$other" "search-s$seed" "${flags[@]}" --search exhaustive
        done
        for seed in $seeds; do      # a single learngene, chosen by a short training of each, or at random; training under Eq. (8)
            al 3 "small-s$seed" "trained-s$seed" --stage train $(of "$seed") --data "$near" --genes 1 --method adaptive,random --search exhaustive \
                --reward-head trained --reward-images 2500 $(train 8000 100)
            al 1.2 "small-s$seed" "constrained-s$seed" --stage train $(of "$seed") --data "$near" --constrained $(train 8000 100)
        done
        if [[ $mode == paper ]]; then return; fi
        # A stream of domains: are held-out classes given the learngene of their domain?
        al 3.4 "" domains --stream base:0-7,signs:0-15,textures:0-9,clothing:0-4 $([[ $mode == smoke ]] || echo --ancestry-epochs 20)
        for seed in $seeds; do
            al 0.2 domains "domains-s$seed" --stage select --seed "$seed" --pool "$out/domains/pool" --data signs:16-31,textures:10-19,clothing:5-9
        done
        # What becomes of learngenes that never had to stand alone, under every start.
        for init in delta block zero; do
            al 2.1 "" "literal-$init" --init "$init" --gene-dropout 0 --stream "wide/10#1,wide/10#2,wide/10#3" \
                $([[ $mode == smoke ]] || echo --ancestry-epochs 5)
        done ;;
    alternatives)
        untrained logah tal
        for seed in $seeds; do
            # Random parameters, as many images of each task as tuning showed of it: one network.
            tal 1.7 "" "direct-s$seed" --stage train --method random --seed "$seed" --train-images tune "${budget[@]}"
        done
        for seed in $once; do
            # The same with TAL's start, LoGAH's, and with weights selected from the ancestry, on few images; then tasks new to all.
            for images in 1000 4000; do
                flags=(--stage train --seed "$seed" --data "$nine" $(train "$images" $((images / 200))))
                tal 0.5 "" "random-s$seed/images-$images" --method random "${flags[@]}"
                tal 0.5 "" "tal-s$seed" "${flags[@]}"
                tal 0.5 "" "logah-s$seed" --method logah "${flags[@]}"
                tal 0.5 ancestry "selection-s$seed" --method selection "${flags[@]}"
            done
            tal 0.2 ancestry "selection-s$seed" --method selection --stage train --seed "$seed" --data "$unseen" $(train 4000 5)
            # As many images as take the time of TAL's whole pipeline (ancestry 204 s, both stages 328 s, at 3,300 images/s of 3-Small), shared
            # among its nine tasks; on every third of them.
            tal 3.2 "" "random-s$seed/equal" --stage train --method random --seed "$seed" --data "$(cut -d, -f1,4,7 <<< "$nine")" $(train 195000 900)
            # Where sizes match, the ancestry itself can be trained on, under a fresh head.
            flags=(--stage train --seed "$seed" --data "$nine,$unseen" --size "$([[ $mode == paper ]] && echo base || echo drawn-base)"
                   --depth "$([[ $mode == paper ]] && echo 12 || echo 4)" $(train 4000 20))
            tal 0.8 "" "random-s$seed/base" --method random "${flags[@]}"
            tal 0.8 "" "tal-s$seed" "${flags[@]}"
            tal 0.8 ancestry "finetune-s$seed" --method finetune "${flags[@]}"
        done ;;
    data) ;;                                                              # not a cell: drawn and measured anew below
    *) echo "error: unknown part $1; see the top of reproduce.sh" >&2; exit 2 ;;
    esac
}

if (( ! ${#parts[@]} )); then
    parts=(tal-2 tal-1 tal-3 tal-4 tal-5 tal-6 tal-7 tal-8 tal-9 tal-fig3 al-1 al-2 al-3 al-4 al-fig3 al-fig4 alternatives)
fi
for part in "${parts[@]}"; do table "$part"; done

# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------

finished() { grep -Fxqs -- "${commands[$1]}" "$out/${names[$1]}/done"; }

if [[ $dry ]]; then
    for i in "${!names[@]}"; do
        state=todo && if finished "$i"; then state=done; fi
        echo "${minutes[i]} $state ${names[i]} ${commands[i]}"
    done | awk -v jobs="$jobs" '{ printf "%5.1f min  %s  %-26s", $1, $2, $3; for (i = 4; i <= NF; i++) printf " %s", $i; print ""; sum += $1; left += ($2 == "todo") * $1 }
        END { printf "%d cells, %.0f minutes of one core, %.0f of them still to do: about %.0f minutes with %d at a time\n", NR, sum, left, left / jobs, jobs }'
    if [[ $mode == paper ]]; then echo "How long full runs take is under \"In full\" in the README."; fi
    exit
fi

# An environment: the active one, else .venv, made once where torch is missing.
if [[ ! ${VIRTUAL_ENV:-} ]] && [[ -d .venv ]] || ! python -c 'import torch' 2> /dev/null; then
    if [[ ! -d .venv ]]; then python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt; fi
    source .venv/bin/activate
fi
launcher=python gpus=$(nvidia-smi -L 2> /dev/null | wc -l || true)
if [[ $mode == paper ]] && (( gpus > 1 )); then launcher="torchrun --standalone --nproc-per-node $gpus"; fi
mkdir -p results "$out"
python - "$(git rev-parse --short HEAD 2> /dev/null || echo unknown)$(git diff --quiet HEAD 2> /dev/null || echo ' (changed)')" "$jobs" >> "$out/run.txt" <<'PY'
# One line on machine and versions; the cells that follow add theirs: minutes, name, command.
import datetime, os, pathlib, platform, sys
import torch
info = pathlib.Path("/proc/cpuinfo")
cpu = next((l.split(":")[1].strip() for l in info.read_text().splitlines() if l.startswith("model name")), "") if info.exists() else platform.processor()
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"# {datetime.datetime.now():%Y-%m-%d %H:%M}, commit {sys.argv[1]}, {cpu or platform.machine()}, {os.cpu_count()} cores, {gpu}, "
      f"torch {torch.__version__}, python {platform.python_version()}, {sys.argv[2]} at a time")
PY

run() {     # run CELL, in the background; a finished one is noted in done, with its very flags
    local name=${names[$1]} command=${commands[$1]} folder=$out/${names[$1]}
    mkdir -p "$folder"
    # TAL-st of Table 7 is tuned from the pretraining that TAL was tuned from
    if [[ $name == st-* && ! -f $folder/pretrain.pt ]]; then cp "$out/${needs[$1]}/pretrain.pt" "$folder/"; fi
    (
        start=$(date +%s)
        $launcher $command --output "$folder" > "$folder/$start.txt" 2> "$folder/errors.txt" &
        trap 'kill %1; exit 1' TERM
        if wait %1; then
            echo "$(awk "BEGIN { printf \"%.1f\", ($(date +%s) - $start) / 60 }") $name $command" >> "$out/run.txt"
            echo "$command" >> "$folder/done"
        else
            echo "error: $name failed, see $folder/errors.txt" >&2
        fi
    ) &
    pids[$1]=$!
}
trap 'kill $(jobs -rp) 2> /dev/null; exit 130' INT TERM               # what runs stops, and goes on from its checkpoint next time

state=() pids=()        # state of a cell: nothing yet, running, done, failed
ready() {   # are the cells done that this one needs, and the earlier ones of its own folder? (2: one of them failed)
    local j
    for (( j = 0; j < $1; j++ )); do
        if [[ ${names[j]} == "${names[$1]}" || " ${needs[$1]} " == *" ${names[j]} "* ]]; then
            if [[ ${state[j]} == failed ]]; then return 2; elif [[ ${state[j]} != done ]]; then return 1; fi
        fi
    done
}

for i in "${!names[@]}"; do if finished "$i"; then state[i]=done; else state[i]=''; fi; done
while [[ " ${state[*]/#/x} " == *" x "* || " ${state[*]} " == *running* ]]; do
    for i in "${!names[@]}"; do
        if [[ ${state[i]} == running ]]; then
            kill -0 "${pids[i]}" 2> /dev/null && continue
            if finished "$i"; then state[i]=done; else state[i]=failed; fi
        fi
    done
    for i in "${!names[@]}"; do
        if (( $(jobs -rp | wc -l) >= jobs )); then break; fi
        if [[ ! ${state[i]} ]]; then
            ready "$i" && code=0 || code=$?
            if (( code == 0 )); then echo "${names[i]}: ${commands[i]}"; run "$i"; state[i]=running; elif (( code == 2 )); then state[i]=failed; fi
        fi
    done
    if (( $(jobs -rp | wc -l) )); then wait -n || true; fi
done

if [[ " ${parts[*]} " == *" data "* ]]; then
    python data.py --output results/contact_sheet.png
    python data.py --difficulty | tee results/difficulty.md
fi
python results/tables.py "$out"
[[ " ${state[*]} " != *failed* ]]
