#!/usr/bin/env bash
# `make demo`: the full pipeline on a laptop, from video files to generated video. Everything is written to demo/.
#   clips (H.264) -> shards of latents -> ZeRO-3 training in two processes -> T2V and I2V -> a table of scores
# Run it again to continue where it stopped, or run `make clean-demo` first to start over. DEMO_STEPS=200 is a short run.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
OUT=demo RUN=demo/run STEPS=${DEMO_STEPS:-1500} PORT=${DEMO_PORT:-29671}
START=$SECONDS
stage() { printf '\n== %s (%d s elapsed)\n' "$1" $((SECONDS - START)); }

stage "1/5 toy clips: H.264 files of a bouncing disc, four colors, 6 to 10 frames"
[ -f $OUT/clips/manifest.jsonl ] || python data_prep/make_toy.py --out $OUT/clips --clips 2400 --seed 0

stage "2/5 encode them to shards of latents"
python data_prep/encode_shards.py --config configs/encode_toy.yaml source=$OUT/clips/manifest.jsonl out=$OUT/shards

stage "3/5 train with DeepSpeed ZeRO-3 in two processes"
deepspeed --num_gpus 2 --master_port "$PORT" train/main.py --config configs/demo.yaml \
    run_dir=$RUN data.path=$OUT/shards max_steps="$STEPS"

stage "4/5 generate: class-to-video, image-to-video from held-out clips, and samples of the untrained model"
export OMP_NUM_THREADS=2
rm -rf $OUT/t2v $OUT/i2v $OUT/untrained
python data_prep/make_toy.py --out $OUT/unseen --clips 24 --seed 1
flowception generate $RUN --task t2v --num 48 --seed 1 --out $OUT/t2v
flowception generate $RUN --task i2v --context $OUT/unseen/*.mp4 --num 24 --seed 2 --out $OUT/i2v
flowception generate $RUN --task t2v --num 24 --seed 1 --checkpoint 0 --max-frames 12 --out $OUT/untrained

stage "5/5 score generated clips by the toy world's laws"
score() { python benchmarks/score_demo.py --real $OUT/clips --untrained $OUT/untrained --generated "$@"; }
failed=0
printf 'Class-to-video\n\n'
score $OUT/t2v --json $OUT/scores.json --picture $OUT/scores.png --check || failed=1
printf '\nImage-to-video: the first frame is given and not scored\n\n'
score $OUT/i2v --json $OUT/scores_i2v.json --check || failed=1

printf '\nDone in %d s. Look at: %s\n' $((SECONDS - START)) \
    "$OUT/t2v/contact.png  $OUT/i2v/contact.png  $OUT/t2v/clip_0000_growth.png  $OUT/scores.png"
[ $failed = 0 ] || echo "The demo broke a promise; see BROKEN above." >&2
exit $failed
