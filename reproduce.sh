#!/usr/bin/env bash
# Every table and figure of both papers, and which of their claims hold: trains, measures, writes results/.
#
#   bash reproduce.sh                      everything, on drawn data: no download, two CPU cores are enough
#   bash reproduce.sh tal-2 al-4           only these parts, and what they need
#   bash reproduce.sh headline             what the headline claims rest on: about an hour
#   bash reproduce.sh --dry-run [PART...]  lists the commands and how long they take, runs none
#   bash reproduce.sh --cell NAME          only the cell of that name (--list prints all); it waits for others
#   SMOKE=1 bash reproduce.sh [PART...]    the same commands on almost no data, to see that they run
#   DATA=/data ANCESTRY=vit_base.safetensors bash reproduce.sh paper [PART...]
#                                          the papers' datasets and settings: GPU-weeks (docs/full_scale.md)
#   bash reproduce.sh paper --check        what of that is there, what is missing, hours per table
#
# Parts: tal-1 ... tal-9 tal-fig3, al-1 ... al-4 al-fig3 al-fig4 (the papers' tables and figures, "al" being
#        Adaptive-Learngene), al-selection (weight selection, a row of al-1), alternatives (what else the same
#        cost buys; in paper only when named); and, only when named, headline, al-pool (checks of pool and
#        selector that no table shows), data (contact sheet and difficulty of the tasks).
#
# Two commands run at a time (JOBS=2), one thread each; in paper one on every GPU, or with GPUS=N each under
# torchrun on N of them. Started again, it goes on where it was stopped; what two tables share is made once.
# Cells of two states of the code are not put into one table, unless MIXED=1 says so. To stay below two hours
# on two cores, only TAL and LoGAH, and Adaptive-Learngene and its baselines at Small, have three seeds
# (SEEDS="0 1 2"); all else has one (ONCE=0).
set -euo pipefail
cd "$(dirname "$0")"

all_parts="tal-2 tal-1 tal-3 tal-4 tal-5 tal-6 tal-7 tal-8 tal-9 tal-fig3"
all_parts+=" al-1 al-selection al-2 al-3 al-4 al-fig3 al-fig4 alternatives"
only_when_named="headline al-pool data"

mode=drawn
action=run # or dry-run, list, check
cell=""
parts=""
while (($#)); do
    word=$1
    shift
    case $word in
    -h | --help)
        sed -n '2,/^set/ { /^set/d; s/^# \{0,1\}//; p }' reproduce.sh
        exit
        ;;
    --dry-run | --list | --check) action=${word#--} ;;
    --cell)
        cell=${1:?error: --cell needs a name}
        shift
        ;;
    paper) mode=paper ;;
    *)
        if [[ " $all_parts $only_when_named " != *" $word "* ]]; then
            echo "error: there is no part $word; bash reproduce.sh --help lists them" >&2
            exit 2
        fi
        parts+=" $word"
        ;;
    esac
done
if [[ ${SMOKE:-} ]]; then
    mode=smoke
fi
out=runs/$mode

# ----------------------------------------------------------------------------------------------------------
# Settings: the drawn data beside the papers'
# ----------------------------------------------------------------------------------------------------------

setting() { # setting NAME DRAWN PAPER
    if [[ $mode == paper ]]; then
        printf -v "$1" %s "$3"
    else
        printf -v "$1" %s "$2"
    fi
}

if [[ $action == check ]]; then
    mode=paper
    DATA=${DATA:-data}
    ANCESTRY=${ANCESTRY:-vit_base.safetensors}
fi
if [[ $mode == paper ]]; then
    all_parts=${all_parts/ alternatives/}
fi
if [[ $mode == paper && ! (${DATA:-} && ${ANCESTRY:-}) ]]; then
    echo "error: paper needs DATA=, the folder of the datasets, and ANCESTRY=, a published ViT-Base" >&2
    exit 2
fi
DATA=${DATA:-}
ANCESTRY=${ANCESTRY:-}
GPT2=${GPT2:-$DATA/gpt2}            # folder with model.safetensors, vocab.json and merges.txt
if [[ $DATA$ANCESTRY$GPT2 == *" "* ]]; then
    echo "error: DATA, ANCESTRY and GPT2 must not have blanks in their names" >&2
    exit 2
fi

paper_flags="--preset paper --data-dir $DATA"
setting seeds             "${SEEDS:-0 1 2}"                     "${SEEDS:-0}"
setting at_a_time         "${JOBS:-2}"                          "${JOBS:-1}"
setting tal_flags         ""                                    "$paper_flags"
setting text_flags        ""                                    "$paper_flags --tokens $GPT2"
setting al_flags          ""                                    "$paper_flags"
setting text_ancestry     $out/text-ancestry/ancestry.pt        "$GPT2/model.safetensors"

# Networks: what precedes their sizes' names, and SIZE-LAYERS
setting sizes             drawn-                                ""
setting swin              drawn-swin                            swin_t
setting swin_stream       "--stream wide/5 --ancestry-epochs 5" ""
setting ancestry_size     "--size 64x8 --depth 4"               "--size base --depth 12"
setting curve_size        small                                 base
setting ablation_sizes    small                                 "small base"
setting unseen_sizes      small-3                               "tiny-3 small-6"
setting depths \
    "small-3 small-6 small-9" \
    "$(echo {tiny,small}-{6,9,12} base-{6..12})" # A15: of two rows "Base 12" one is 11

# Tasks
setting base              base                                  imagenet
setting nine \
    "aircraft objects pedestrian textures signs glyphs digits motion flowers" \
    "aircraft cifar100 daimlerpedcls dtd gtsrb omniglot svhn ucf101 vgg-flowers"
setting decathlon         ""                                    decathlon/
setting nine_split        ""                                    "--split val"
setting every_third       "aircraft textures digits"            "aircraft dtd svhn"
setting unseen            clothing,faces,lesions                fashion-mnist,fer2013,ham10000 # D23
setting texts \
    "paraphrases acceptability entailment sentiment" \
    "mrpc cola rte imdb"
setting near              kinds,variety,tail                    cifar10,cifar100,food101
setting others            textures,aircraft,flowers             cars,flowers102-trainval
setting sixth             ""                                    inaturalist2019
setting few_of            "$near"                               "$near,$sixth"
setting few               "1 3 6 8"                             "1 2 3 4"
setting draws_of          "$near"                               cifar10,flowers102-trainval
setting curve             variety                               cifar100
setting wide              wide                                  imagenet
setting scenes            scenes                                ade20k

# How long networks are trained on
setting base_length       "--train-images 8000"                 "--train-epochs 75"
setting nine_length       "--train-images 2000"                 "--train-epochs 100"
setting nine_twice        "--train-images 4000"                 "--train-epochs 200"
setting unseen_short      "--train-images 4000"                 "--train-epochs 5"
setting unseen_long       "--train-images 40000"                "--train-epochs 100"
setting text_length       "--train-images 60000"                "--train-epochs 100"
setting text_logah_length "--tune-epochs 15"                    "--tune-epochs 250"
setting six_few           "--train-images 2000"                 ""
setting six_length        "--train-images 8000"                 "--train-epochs 500"
setting sixth_length      ""                                    "--train-epochs 100"
setting wide_length       "--train-images 8000"                 "--train-epochs 50"
setting wide_scratch      "--train-images 8000"                 "--train-epochs 100"
setting wide_share        "--reward-share 0.01"                 ""
setting scenes_length     "--train-images 4000"                 "--train-epochs 50"
setting scenes_batch      ""                                    "--batch-size 16 --train-lr 1e-4" # A16
setting ablation_length   "--train-images 2000"                 "--train-epochs 100"
setting curve_length      "--train-images 16000"                "--train-epochs 300"
setting swin_length       "--train-images 8000"                 "--train-epochs 300"
setting few_images        "--train-images 1000"                 "--train-epochs 5"
setting more_images       "--train-images 4000"                 "--train-epochs 20"
setting pipeline_images   "--train-images 195000"               "--train-epochs 900"

if [[ $mode == smoke ]]; then       # flags that come last in a command count
    tal_flags+=" --ancestry-epochs 0.02 --pretrain-epochs 0.02 --tune-epochs 0.02 --train-images 128"
    text_flags+=" --ancestry-epochs 0.02 --tune-epochs 0.02 --train-images 128"
    al_flags+=" --ancestry-epochs 0.05 --select-steps 3 --train-images 128"
fi
once=${ONCE:-${seeds%% *}}
nine_tasks=$decathlon${nine// /,$decathlon}
three_tasks=$decathlon${every_third// /,$decathlon}

# ----------------------------------------------------------------------------------------------------------
# The commands, by table
#
#     tal MINUTES NAME FLAGS...     is  python tal.py --output $out/NAME --ancestry FILE FLAGS...
#     text MINUTES NAME FLAGS...    is  python tal.py --output $out/NAME --modality text FLAGS...
#     al MINUTES NAME FLAGS...      is  python adaptive_learngene.py --output $out/NAME FLAGS...
#
# Minutes are those of one core (AMD EPYC). A command waits for those before it that have its NAME, and for
# those whose folders it names. What two tables list is run once.
# ----------------------------------------------------------------------------------------------------------

seeds_of() { # seeds_of METHOD
    case $1 in
    tal | logah) echo "$seeds" ;;
    *) echo "$once" ;;
    esac
}

hypernetworks() { # hypernetworks METHOD...: pretrained and tuned; their networks are measured untrained
    for method in "$@"; do
        for seed in $(seeds_of "$method"); do
            if [[ $mode != paper ]]; then
                cell 5.0 "ancestry-s$seed" python tal.py --output "$out/ancestry-s$seed" --stage ancestry \
                    --seed "$seed" $tal_flags
            fi
            case $method in
            tal) untrained 6.0 "tal-s$seed" "$seed" ;;
            tal+) untrained 8.0 "tal+-s$seed" "$seed" --method tal+ ;;
            logah) untrained 4.8 "logah-s$seed" "$seed" --method logah ;;
            ghn3) untrained 6.6 "ghn3-s$seed" "$seed" --method ghn3 ;;
            informed) informed ;;
            no-*) untrained 5.5 "$method-s$seed" "$seed" --without "${method#no-}" ;;
            esac
        done
    done
}

informed() { # an ancestry that knows the nine tasks and teaches in both stages (D15, D17)
    if [[ $mode != paper ]]; then
        cell 3.5 "ancestry-informed-s$seed" python tal.py --output "$out/ancestry-informed-s$seed" \
            --stage ancestry --seed "$seed" --ancestry-tasks "$base,$nine_tasks" $tal_flags
        untrained 6.0 "tal-informed-s$seed" "$seed" --tune-alpha 0.5 \
            --ancestry "$out/ancestry-informed-s$seed/ancestry.pt"
    fi
}

untrained() { # untrained MINUTES NAME SEED FLAGS...: the paper's numbers are those of the Decathlon's val
    tal "$1" "$2" --stage evaluate --seed "$3" "${@:4}" $nine_split
}

tal-1() { # the base task: untrained, as pretrained; then trained on
    hypernetworks ghn3 logah tal tal+
    for method in ghn3 logah tal tal+; do
        for seed in $(seeds_of "$method"); do
            tal 0.4 "$method-s$seed" --stage pretrain --seed "$seed" --method "$method"
        done
        for seed in $once; do
            for size in tiny small; do
                tal 0.6 "$method-s$seed" --stage train --source pretrain --seed "$seed" --method "$method" \
                    --data "$base" --size "$sizes$size" --depth 12 $base_length
            done
        done
    done
}

tal-2() { # the nine tasks, without training
    hypernetworks ghn3 logah tal tal+ informed
}

tal-3() { # the nine tasks, trained on; from random parameters twice as long
    hypernetworks ghn3 logah tal tal+
    for seed in $seeds; do
        trained_on small "$seed" random logah tal
    done
    for seed in $once; do
        trained_on small "$seed" ghn3 tal+
        trained_on tiny "$seed" random ghn3 logah tal tal+
    done
}

trained_on() { # trained_on SIZE SEED METHOD...
    for method in "${@:3}"; do
        flags="--stage train --seed $2 --method $method --data $nine_tasks $nine_split"
        flags+=" --size $sizes$1 --depth 12"
        if [[ $method == random ]]; then
            tal 1.2 "random-s$2/trained" $flags $nine_twice
        else
            tal 0.8 "$method-s$2" $flags $nine_length
        fi
    done
}

tal-4() { # training time: what these log
    hypernetworks ghn3 logah tal tal+
}

tal-5() { # unseen tasks, a short and a long training under a fresh head
    hypernetworks logah tal
    for seed in $seeds; do
        for network in $unseen_sizes; do
            flags="--stage train --seed $seed --data $unseen --size $sizes${network%-*} --depth ${network#*-}"
            tal 0.2 "random-s$seed/unseen-short" $flags --method random $unseen_short
            tal 0.9 "random-s$seed/unseen-long" $flags --method random $unseen_long
            tal 0.2 "tal-s$seed" $flags $unseen_short
            tal 0.9 "tal-s$seed" $flags $unseen_long
            tal 0.2 "logah-s$seed" $flags --method logah --source pretrain $unseen_short
            tal 0.9 "logah-s$seed" $flags --method logah --source pretrain $unseen_long
        done
    done
}

tal-6() { # text: one TAL for all tasks; a LoGAH for each, as long, and (the paper) 2.5 times as long
    if [[ $mode != paper ]]; then
        text 6.0 text-ancestry --stage ancestry
    fi
    for seed in $once; do
        text 6.0 "text-tal-s$seed" --stage evaluate --seed "$seed" --ancestry "$text_ancestry"
        for task in $texts; do
            flags="--stage evaluate --seed $seed --method logah --tune-tasks $task"
            text 1.0 "text-equal-$task-s$seed" $flags
            text 2.3 "text-logah-$task-s$seed" $flags $text_logah_length
        done
    done
    seed=${seeds%% *}
    flags="--stage train --seed $seed --method random --data ${texts// /,}"
    text 3.2 "text-random-s$seed" $flags $text_length
}

tal-7() { # tuned on one task alone, from the pretraining of TAL
    hypernetworks tal
    for seed in $once; do
        for task in $nine; do
            cell 0.0 "st-$task-s$seed" cp "$out/tal-s$seed/pretrain.pt" "$out/st-$task-s$seed"
            untrained 0.8 "st-$task-s$seed" "$seed" --tune-tasks "$decathlon$task"
        done
    done
}

tal-8() { # ablations; Table 9 has the same by size and task
    hypernetworks no-task-info no-ancestry tal informed
}

tal-9() {
    hypernetworks no-task-info no-ancestry tal
}

tal-fig3() { # task-specific graphs
    hypernetworks tal
    for seed in $seeds; do
        tal 0.2 "tal-s$seed" --stage plot --seed "$seed"
    done
}

pools() { # pools SIZE SEEDS: ten class subsets of the wide task, one learngene each
    for seed in $2; do
        case $1 in
        base) al 27.0 "base-s$seed" --stage ancestry --seed "$seed" --size "${sizes}base" ;;
        small) al 9.0 "small-s$seed" --stage ancestry --seed "$seed" --size "${sizes}small" ;;
        *) al 6.0 "$1-s$seed" --stage ancestry --seed "$seed" --size "$sizes$1" ;;
        esac
    done
}

ancestors() { # ancestors SIZE: of the baselines, on as many images as a pool
    case $1 in
    small) al 25.0 ancestors --stage pretrain --size "${sizes}small" --method tleg,peg,auto ;;
    tiny) al 15.0 ancestors --stage pretrain --size "${sizes}tiny" --method tleg,peg,auto ;;
    base) al 75.0 ancestors --stage pretrain --size "${sizes}base" --method tleg,peg,auto ;;
    esac
}

descendants() { # descendants MINUTES NAME SIZE SEED FLAGS...: trained on, from the pool of that size and seed
    al "$1" "$2" --stage train --size "$sizes$3" --seed "$4" --pool "$out/$3-s$4/pool" "${@:5}"
}

al-1() { # six tasks, from every start
    six_tasks_of small "$seeds"
    six_tasks_of tiny "$once"
}

six_tasks_of() { # six_tasks_of SIZE SEEDS
    pools "$1" "$2"
    ancestors "$1"
    six_tasks 3.3 "$1" "$2" adaptive,all,scratch,prefine,heur,auto,peg,tleg
}

al-selection() { # the same six tasks, from weights that are selected of the next larger size's
    for size in small tiny; do
        al 30.0 ancestors --stage pretrain --size "$sizes$size" --method weight-selection
    done
    six_tasks 2.0 small "$seeds" weight-selection
    six_tasks 2.0 tiny "$once" weight-selection
}

six_tasks() { # six_tasks MINUTES SIZE SEEDS METHODS: on drawn data also after few images
    starts="--ancestors $out/ancestors --method $4"
    for seed in $3; do
        if [[ $six_few ]]; then
            descendants "$1" "table1-$2-s$seed" "$2" "$seed" --data "$near,$others" $starts $six_few
        fi
        descendants "$1" "table1-$2-s$seed" "$2" "$seed" --data "$near,$others" $starts $six_length
        if [[ $sixth ]]; then
            descendants 0.0 "table1-$2-s$seed" "$2" "$seed" --data "$sixth" $starts $sixth_length
        fi
    done
}

al-2() { # networks of several depths on the wide task
    for network in $depths; do
        size=${network%-*}
        flags="--depth ${network#*-} --data $wide --ancestors $out/ancestors"
        pools "$size" "$once"
        ancestors "$size"
        for seed in $once; do
            descendants 0.3 "table2-$network-s$seed" "$size" "$seed" $flags --method scratch $wide_scratch
            descendants 0.8 "table2-$network-s$seed" "$size" "$seed" $flags --method peg,tleg,adaptive \
                $wide_share $wide_length
        done
    done
}

al-3() { # segmentation
    pools small "$once"
    ancestors small
    for seed in $once; do
        al 1.7 "table3-s$seed" --stage segment --size "${sizes}small" --seed "$seed" \
            --pool "$out/small-s$seed/pool" --ancestors "$out/ancestors" --data "$scenes" \
            --method scratch,prefine,heur,peg,adaptive $scenes_batch $scenes_length
    done
}

al-4() { # the smallest selections beside all ten learngenes
    for size in $ablation_sizes; do
        pools "$size" "$seeds"
        for seed in $seeds; do
            descendants 0.7 "table4-$size-all-s$seed" "$size" "$seed" --data "$few_of" --method all \
                $ablation_length
            for genes in $few; do
                descendants 0.7 "table4-$size-$genes-s$seed" "$size" "$seed" --data "$few_of" \
                    --genes "$genes" $ablation_length
            done
        done
    done
}

al-fig3() { # convergence
    pools "$curve_size" "$seeds"
    ancestors "$curve_size"
    al 3.2 swin --stage ancestry --size "$swin" $swin_stream
    for seed in $seeds; do
        descendants 1.2 "figure3-s$seed" "$curve_size" "$seed" --ancestors "$out/ancestors" --data "$curve" \
            --method scratch,adaptive,prefine $curve_length
    done
    for seed in $once; do
        al 1.0 "figure3-swin-s$seed" --stage train --size "$swin" --seed "$seed" --pool "$out/swin/pool" \
            --data "$curve" --method scratch,adaptive $swin_length
    done
}

al-fig4() { # five of ten learngenes, chosen by TALS and at random
    for size in $ablation_sizes; do
        pools "$size" "$seeds"
        for seed in $seeds; do
            descendants 3.2 "figure4-$size-s$seed" "$size" "$seed" --data "$draws_of" --genes 5 \
                --method adaptive,random,random1,all,scratch $ablation_length
        done
    done
}

headline() { # what the headline claims rest on, all of it with three seeds
    local once=$seeds
    hypernetworks logah tal no-task-info no-ancestry
    six_tasks_of small "$seeds"
    al-4
}

al-pool() {
    # REINFORCE against the exhaustive search. Its samples and rate were chosen on the first seed's pool; this
    # is the second's, if there is one.
    second=${seeds#* }
    second=${second%% *}
    pools tiny "$second"
    pools small "$seeds"
    for seed in 0 1 2 3 4 5 6 7 8 9; do
        flags="--stage select --seed $seed --size ${sizes}tiny --data ${near%%,*}"
        flags+=" --pool $out/tiny-s$second/pool"
        al 0.3 "search-s$seed" $flags
        al 0.4 "search-s$seed" $flags --search exhaustive
    done
    # A single learngene, chosen by a short training of each, or at random; training under Eq. (8).
    for seed in $seeds; do
        descendants 3.0 "trained-s$seed" small "$seed" --data "$near" --genes 1 --method adaptive,random \
            --search exhaustive --reward-head trained $ablation_length
        descendants 1.2 "constrained-s$seed" small "$seed" --data "$near" --constrained $ablation_length
    done
    if [[ $mode == paper ]]; then
        return
    fi
    # A stream of domains: are held-out classes given the learngene of their domain? Only of learngenes that
    # can stand alone, so with gene-dropout (A4).
    alone="--gene-dropout 0.7 --init random --stem frozen"
    al 3.4 domains --stage ancestry --ancestry-epochs 20 $alone \
        --stream base:0-7,signs:0-15,textures:0-9,clothing:0-4
    for seed in $seeds; do
        al 0.2 "domains-s$seed" --stage select --seed "$seed" --pool "$out/domains/pool" $alone \
            --data signs:16-31,textures:10-19,clothing:5-9
    done
    # What becomes of learngenes that never had to stand alone, under every start.
    for init in zero random block; do
        al 2.1 "literal-$init" --stage ancestry --init "$init" --gene-dropout 0 \
            --stream "wide/10#1,wide/10#2,wide/10#3" --ancestry-epochs 5
    done
}

alternatives() {
    hypernetworks logah tal
    # Random parameters, trained on as many images of each task as tuning showed of it.
    for seed in $seeds; do
        tal 1.7 "direct-s$seed" --stage train --method random --seed "$seed" --train-images tune
    done
    for seed in $once; do
        # The same, TAL's start, LoGAH's, and weights selected from the ancestry, on few images.
        flags="--stage train --seed $seed --data $nine_tasks"
        few_and_more "random-s$seed/few" $flags --method random
        few_and_more "tal-s$seed" $flags
        few_and_more "logah-s$seed" $flags --method logah
        few_and_more "selection-s$seed" $flags --method selection
        tal 0.2 "selection-s$seed" --stage train --seed "$seed" --data "$unseen" --method selection \
            $unseen_short
        # As many images as take the time of TAL's whole pipeline (ancestry 204 s, both stages 328 s, at 3,300
        # images/s of 3-Small), shared among its nine tasks; on every third of them.
        tal 3.2 "random-s$seed/equal" --stage train --seed "$seed" --data "$three_tasks" --method random \
            $pipeline_images
        # Where sizes match, the ancestry itself can be trained on, under a fresh head.
        flags+=",$unseen $ancestry_size $more_images"
        tal 0.8 "random-s$seed/base" $flags --method random
        tal 0.8 "tal-s$seed" $flags
        tal 0.8 "finetune-s$seed" $flags --method finetune
    done
}

few_and_more() { # few_and_more NAME FLAGS...
    tal 0.5 "$@" $few_images
    tal 0.5 "$@" $more_images
}

data() { # drawn and measured anew at the end
    :
}

# ----------------------------------------------------------------------------------------------------------
# Cells: commands with a folder of their own
# ----------------------------------------------------------------------------------------------------------

minutes=()
names=()
commands=()
parts_of=() # the part that lists it first
states=()   # waiting, running, done, failed, or elsewhere: another process runs it

cell() { # cell MINUTES NAME COMMAND...
    for i in "${!names[@]}"; do
        if [[ ${names[i]} == "$2" && ${commands[i]} == "${*:3}" ]]; then
            return
        fi
    done
    minutes+=("$1")
    names+=("$2")
    commands+=("${*:3}")
    parts_of+=("$part")
}

tal() {
    local ancestry=$ANCESTRY
    if [[ $mode != paper ]]; then
        ancestry=$out/ancestry-s$seed/ancestry.pt               # every seed has its own
    fi
    cell "$1" "$2" python tal.py --output "$out/$2" --ancestry "$ancestry" "${@:3}" $tal_flags
}

text() {
    cell "$1" "$2" python tal.py --output "$out/$2" --modality text "${@:3}" $text_flags
}

al() {
    cell "$1" "$2" python adaptive_learngene.py --output "$out/$2" "${@:3}" $al_flags
}

finished() { # finished CELL: whether it is noted, with these very flags
    grep -Fxqs -- "${commands[$1]}" "$out/${names[$1]}/done"
}

for part in ${parts:-$all_parts}; do
    "$part"
done
for i in "${!names[@]}"; do
    states[i]=waiting
    if finished "$i"; then
        states[i]=done
    elif [[ $cell && $cell != "${names[i]}" ]]; then
        states[i]=elsewhere
    fi
done
if [[ $cell && " ${names[*]} " != *" $cell "* ]]; then
    echo "error: there is no cell $cell; bash reproduce.sh --list prints their names" >&2
    exit 2
fi

if [[ $action == list ]]; then
    printf '%s\n' "${names[@]}" | awk '!seen[$0]++'
    exit
fi
if [[ $action == dry-run ]]; then
    all=0
    left=0 # in tenths of a minute
    for i in "${!names[@]}"; do
        if [[ $mode != drawn ]]; then
            minutes[i]=0.0
        fi
        printf '%5s min  %-7s  %-26s  %s\n' "${minutes[i]}" "${states[i]}" "${names[i]}" "${commands[i]}"
        tenths=$((10#${minutes[i]/./}))
        all=$((all + tenths))
        if [[ ${states[i]} == waiting ]]; then
            left=$((left + tenths))
        fi
    done
    echo "${#names[@]} cells, $((all / 10)) minutes of one core, $((left / 10)) of them still to do:" \
        "about $((left / 10 / at_a_time)) minutes with $at_a_time at a time"
    if [[ $mode == paper ]]; then
        echo "How long they take: bash reproduce.sh paper --check"
    fi
    exit
fi

# ----------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------

# An environment: the active one, else .venv, which is made where torch is missing.
if [[ -z ${VIRTUAL_ENV:-} && -d .venv ]] || ! python -c 'import torch' 2> /dev/null; then
    if [[ ! -d .venv ]]; then
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    source .venv/bin/activate
fi

if [[ $action == check ]]; then
    for i in "${!names[@]}"; do
        printf '%s\t%s\t%s\t%s\n' "${parts_of[i]}" "${states[i]}" "${names[i]}" "${commands[i]}"
    done | python results/plan.py --data-dir "$DATA" --ancestry "$ANCESTRY" --gpt2 "$GPT2" --output "$out"
    exit
fi

python=python
gpus=() # of the papers' runs; slot 0 has the first GPUS of them, slot 1 the next
if [[ $mode == paper ]]; then
    last=$(($(nvidia-smi -L 2> /dev/null | wc -l || true) - 1))
    IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES-$(seq -s, 0 "$last")}"
    if ((${#gpus[@]})); then
        at_a_time=$((${#gpus[@]} / ${GPUS:-1}))
    fi
    if ((at_a_time == 0)); then
        echo "error: GPUS=$GPUS, but there are ${#gpus[@]}" >&2
        exit 2
    fi
    if [[ ${GPUS:-} ]]; then
        python="torchrun --standalone --nproc-per-node $GPUS"
    fi
fi
slots=() # of the cells that are running

free_slot() {
    local slot=0
    while [[ " ${slots[*]} " == *" $slot "* ]]; do
        slot=$((slot + 1))
    done
    echo "$slot"
}

mkdir -p results "$out"
if [[ " ${states[*]} " == *" waiting "* ]]; then
    python results/machine.py "$at_a_time" >> "$out/run.txt"
    started=yes
fi

run() { # run CELL, in the background; once finished it is noted in NAME/done and, with minutes, in run.txt
    local name=${names[$1]} command=${commands[$1]} folder=$out/${names[$1]}
    echo "$name: $command"
    mkdir -p "$folder"
    rm -f "$folder/failed"
    slots[$1]=$(free_slot)
    (
        if ((${#gpus[@]})); then
            mine=("${gpus[@]:slots[$1] * ${GPUS:-1}:${GPUS:-1}}")
            CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")
            export CUDA_VISIBLE_DEVICES
        fi
        in_parts=""
        if [[ $mode == paper && $command == python* ]]; then
            in_parts=$(python results/plan.py --accumulate "${GPUS:-1}" --command "$command")
        fi
        SECONDS=0
        ${command/#python/$python} $in_parts > "$folder/$(date +%s).txt" 2> "$folder/errors.txt" &
        trap 'kill %1; exit 1' TERM
        if wait %1; then
            tenths=$((SECONDS / 6))
            echo "$((tenths / 10)).$((tenths % 10)) $name $command" >> "$out/run.txt"
            echo "$command" >> "$folder/done"
        else
            touch "$folder/failed"
            echo "error: $name failed, see $folder/errors.txt" >&2
        fi
    ) &
    pids[$1]=$!
}

needs() { # needs CELL EARLIER: whether they share a folder, or one names the other's
    [[ ${names[$1]} == "${names[$2]}" || "${commands[$1]} " == *" $out/${names[$2]}"[/\ ]* ]]
}

state_of_needs() { # state_of_needs CELL: failed if one of them is, done if all of them are
    local answer=done
    for ((earlier = 0; earlier < $1; earlier++)); do
        if needs "$1" "$earlier"; then
            if [[ ${states[earlier]} == elsewhere ]] && finished "$earlier"; then
                states[earlier]=done
            fi
            case ${states[earlier]} in
            failed) answer=failed ;;
            elsewhere)
                answer=waiting
                if [[ -e $out/${names[earlier]}/failed ]]; then
                    echo failed
                    return
                fi
                ;;
            waiting | running)
                echo waiting
                return
                ;;
            esac
        fi
    done
    echo "$answer"
}

start_what_can() {
    for i in "${!names[@]}"; do
        if ((${#slots[@]} >= at_a_time)); then
            return
        fi
        if [[ ${states[i]} == waiting ]]; then
            case $(state_of_needs "$i") in
            done)
                run "$i"
                states[i]=running
                ;;
            failed) states[i]=failed ;;
            esac
        fi
    done
}

note_what_ended() {
    for i in "${!names[@]}"; do
        if [[ ${states[i]} == running ]] && ! kill -0 "${pids[i]}" 2> /dev/null; then
            states[i]=failed
            unset "slots[i]"
            if finished "$i"; then
                states[i]=done
            fi
        fi
    done
}

pids=()
trap 'kill $(jobs -rp) 2> /dev/null; exit 130' INT TERM # what runs goes on from its checkpoint next time
while [[ " ${states[*]} " == *" waiting "* || " ${states[*]} " == *" running "* ]]; do
    start_what_can
    if [[ " ${states[*]} " == *" waiting "* && " ${states[*]} " != *" running "* ]]; then
        sleep "${WAIT:-60}" & # what is needed runs elsewhere
    fi
    wait -n || true
    note_what_ended
done
if [[ ${started:-} ]]; then
    echo "# end $(date '+%Y-%m-%d %H:%M')" >> "$out/run.txt"
fi

if [[ " $parts " == *" data "* ]]; then
    python data.py --output results/contact_sheet.png
    python data.py --difficulty | tee results/difficulty.md
fi
if [[ ! $cell ]]; then
    python results/tables.py "$out" ${MIXED:+--mixed}
fi
[[ " ${states[*]} " != *" failed "* ]]
