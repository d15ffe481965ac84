#!/usr/bin/env bash
# Text-to-video end to end on a laptop: clips captioned by color and direction, a tiny T5 with random weights, shards
# with text, training, and scored clips from prompts. Everything is written to demo/. Run it again to continue.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
OUT=demo RUN=demo/run_text STEPS=${DEMO_STEPS:-1500} PORT=${DEMO_PORT:-29673}

[ -f $OUT/clips/manifest.jsonl ] || python data_prep/make_toy.py --out $OUT/clips --clips 2400 --seed 0
[ -f $OUT/text_encoder/config.json ] || python data_prep/make_toy_text_encoder.py --out $OUT/text_encoder
python data_prep/encode_shards.py --config configs/encode_toy.yaml configs/encode_toy_text.yaml \
    source=$OUT/clips/manifest.jsonl out=$OUT/shards_text text.model=$OUT/text_encoder
deepspeed --num_gpus 2 --master_port "$PORT" train/main.py --config configs/demo.yaml configs/demo_text.yaml \
    run_dir=$RUN data.path=$OUT/shards_text max_steps="$STEPS"
export OMP_NUM_THREADS=2
python benchmarks/score_prompts.py $RUN --out $OUT/prompts --json $OUT/prompts.json
