"""Flags of the cases that record.py does: tiny networks, few steps, every choice of trainer and samplers."""

SHAPE = "--n_layer=2 --n_head=2 --d_model=32"
RUN = (
    "--device=cpu --dtype=float32 --compile=no --steps=40 --warmup=5 --lr=1e-2 --block_len=64 --batch_size=8"
    " --seed=7 --log_every=1 --eval_every=20 --eval_rows=32 --save_every=0"
)
LONG = f"{RUN} --steps=150 --log_every=10 --eval_every=75"
LOCAL = "--n_layer=2 --n_head=4 --d_model=48 --local_init --init_std=0.06 --rope_base=100"  # learns sooner
NEXT = f"{RUN} --init_from=runs/writer_masked --lr=2e-3"  # goes on with a network that looks at its context
NEXT_AR = f"{RUN} --init_from=runs/writer_ar --lr=2e-3 --objective=ar"
QUICK = (  # 48006ab's configurator/quickstart.py
    "--compile=no --device=cpu --steps=40 --log_every=1 --eval_every=20 --corpus=corpora/docs --n_layer=2"
    " --n_head=8 --n_kv_head=2 --d_model=128 --block_len=64 --rope_base=100 --tied=False --init_std=0.06"
    " --scaled_init=False --local_init --batch_size=16 --lr=2e-3 --lr_schedule=wsd --warmup=50 --decay=0.3"
    " --beta1=0.8 --weight_decay=0.05 --eval_rows=1024"
)
QUICK_MASKED = f"{QUICK} --schedule=poly2"

TRAIN = {
    "ar": f"{RUN} {SHAPE} --objective=ar",
    "masked": f"{RUN} {SHAPE} --save_every=20",
    "maskgit": f"{RUN} {SHAPE} --loss=maskgit",
    "uniform": f"{RUN} {SHAPE} --objective=uniform --loss=elbo",
    "uniform_paper": f"{RUN} {SHAPE} --objective=uniform --loss=paper",
    "shift": f"{RUN} {SHAPE} --shift=yes",
    "network": f"{RUN} --n_layer=3 --n_head=4 --n_kv_head=2 --head_dim=6 --d_model=40 --d_ff=48 --tied=False"
    " --local_init --scaled_init=False --init_std=0.06 --rope_base=100",
    "optimizer": f"{RUN} {SHAPE} --lr_schedule=wsd --decay=0.3 --min_lr=1e-4 --beta1=0.8 --beta2=0.99"
    " --weight_decay=0.3 --clip=0.3",
    "constant": f"{RUN} {SHAPE} --lr_schedule=constant --clip=0 --keep=1 --keep_every=20"
    " --save_every=5 --save_at=7",
    "recompute": f"{RUN} {SHAPE} --recompute=full",
    "micro_batch": f"{RUN} {SHAPE} --micro_batch=2",
    "unique_tokens": f"{RUN} {SHAPE} --unique_tokens=2048 --steps=0 --epochs=10",
    "tokens": f"{RUN} {SHAPE} --steps=0 --tokens=20480",
    "mixture": f"{RUN} {SHAPE} --corpus=corpora/words:0.7:4096,corpora/sums:0.3",
    "all_of_two": f"{RUN} {SHAPE} --corpus=corpora/words,corpora/sums",
    "megatron": f"{RUN} {SHAPE} --corpus=corpora/megatron --tokenizer=bytes",
    "tokenizer_json": f"{RUN} {SHAPE} --corpus=corpora/pieces",
    "quickstart": f"{QUICK_MASKED} --dtype=float32",
    "quickstart_ar": f"{QUICK} --objective=ar --dtype=float32",
    "quickstart_bfloat16": f"{QUICK_MASKED} --dtype=bfloat16",
    "writer_ar": f"{LONG} {LOCAL} --objective=ar",
    "writer_masked": f"{LONG} {LOCAL}",
    "writer_paper": f"{LONG} {LOCAL} --objective=uniform --loss=paper",
    "writer_uniform": f"{LONG} --init_from=runs/writer_paper --objective=uniform --lr=5e-3 --steps=100",
    "adapt": f"{RUN} --init_from=runs/writer_ar --anneal=20",
    "masked_ratio": f"{NEXT} --estimator=ratio",
    "masked_time": f"{NEXT} --estimator=time",
    "iid": f"{NEXT} --time=iid",
    "moving_gaussian": f"{NEXT} --time=moving_gaussian --time_sigma=0.3",
    "moving_gaussian_corrected": f"{NEXT} --time=moving_gaussian --time_correction",
    "cosine": f"{NEXT} --schedule=cosine",
    "cosine_time": f"{NEXT} --schedule=cosine --estimator=time",
    "cosine_uniform": f"{NEXT} --schedule=cosine --objective=uniform",
    "poly2": f"{NEXT} --schedule=poly2",
    "short_rows": f"{NEXT} --short_rows=0.3",
    "short_rows_ar": f"{NEXT_AR} --short_rows=0.3",
    "documents": f"{NEXT} --document_attention",
    "documents_reset": f"{NEXT} --document_attention --reset_positions",
    "documents_ar": f"{NEXT_AR} --document_attention",
    "dropout": f"{NEXT} --dropout=0.1",
    "bfloat16": f"{NEXT} --dtype=bfloat16",
    "skips": f"{NEXT} --skip_norm=2.4 --max_skips=2 --save_every=5 --clip=0",
    "tasks": f"{NEXT} --objective=uniform --steps=20 --eval_tasks=cats --eval_tasks_every=10"
    " --eval_tasks_limit=4 --eval_tasks_masks=8 --task_path=tasks",
}
RANKS = {
    "ddp": f"{RUN} {SHAPE} --micro_batch=2",
    "ddp_dropout": f"{RUN} {SHAPE} --objective=ar --dropout=0.1",
    "shard_full": f"{RUN} {SHAPE} --shard=full",
    "shard_optim": f"{RUN} {SHAPE} --shard=optim --micro_batch=2",
}

WRITE = "--device=cpu --dtype=float32 --seed=3"
HOLES = "--prompts=holes.jsonl"
SAMPLE = {
    "masked": {
        "ancestral": HOLES,
        "ancestral_steps": f"{HOLES} --steps=8 --batch=2 --micro_batch=3",
        "unprompted": "--batch=2 --length=40 --stop=False",
        "first_hitting": f"{HOLES} --order=first_hitting",
        "random": f"{HOLES} --order=random",
        "random_steps": f"{HOLES} --order=random --steps=6",
        "low_confidence": f"{HOLES} --order=low_confidence --temperature=0",
        "low_confidence_steps": f"{HOLES} --order=low_confidence --steps=6",
        "entropy": f"{HOLES} --order=entropy --temperature=0.7",
        "margin": f"{HOLES} --order=margin --steps=12",
        "threshold": f"{HOLES} --order=threshold --threshold=0.4",
        "threshold_surest": f"{HOLES} --order=threshold --threshold=0.6 --beside=surest --temperature=0",
        "remask_capped": f"{HOLES} --remask=capped --eta=0.1 --steps=40",
        "remask_rescaled": f"{HOLES} --remask=rescaled --eta=0.2 --steps=40",
        "remask_confidence": f"{HOLES} --remask=confidence --steps=30",
        "blocks": f"{HOLES} --block=8",
        "blocks_low_confidence": f"{HOLES} --block=8 --order=low_confidence --temperature=0 --steps=10",
        "cache_prefix": f"{HOLES} --block=8 --cache=prefix",
        "cache_dual": f"{HOLES} --block=8 --cache=dual",
        "cache_refresh": f"{HOLES} --block=10 --cache=dual --refresh=3 --order=threshold --threshold=0.5",
        "top_k": f"{HOLES} --top_k=3",
        "top_p": f"{HOLES} --top_p=0.8 --remask=rescaled --steps=40",
        "guidance": f"{HOLES} --guidance=1.5",
        "guidance_blocks": f"{HOLES} --guidance=0.5 --block=8 --order=margin",
        "infill": "--text='the [MASK:3] sees [MASK:9]. a dog [MASK]uns.' --batch=2",
        "suffix": "--prompt='a bird ' --suffix=' the fish.' --length=20 --order=low_confidence",
        "min_length": "--prompt='the cat ' --batch=3 --length=40 --min_length=10",
        "max_length": "--prompt_file=prompt.txt --max_length=30",
        "film": "--prompt='the cat ' --length=16 --html=film.html --show",
    },
    "uniform": {
        "ancestral": HOLES,
        "steps": f"{HOLES} --steps=10",
        "top_k": f"{HOLES} --top_k=5 --temperature=0.8",
        "top_p": f"{HOLES} --top_p=0.8 --steps=20",
    },
    "paper": {
        "ancestral": HOLES,
        "steps": f"{HOLES} --steps=10 --temperature=0.9",
    },
    "ar": {
        "sampled": "--prompts=prompts.jsonl --batch=2",
        "greedy": "--prompts=prompts.jsonl --temperature=0",
        "no_cache": "--prompts=prompts.jsonl --cache=no",
        "top_k": "--prompts=prompts.jsonl --top_k=3 --micro_batch=2",
        "top_p": "--prompts=prompts.jsonl --top_p=0.7 --temperature=1.3",
        "unstopped": "--prompt='the cat ' --batch=2 --stop=False",
        "min_length": "--batch=2 --length=50 --min_length=30",
    },
    "adapt": {  # shifted: predictions stand one position before
        "ancestral": HOLES,
        "low_confidence": f"{HOLES} --order=low_confidence --temperature=0 --steps=6",
        "guidance": f"{HOLES} --guidance=1 --block=8",
    },
}
RUN_OF = {
    "masked": "writer_masked",
    "uniform": "writer_uniform",
    "paper": "writer_paper",
    "ar": "writer_ar",
    "adapt": "adapt",
}

EVAL = {  # (run, further needs, flags)
    "masked": ("writer_masked", (), "--passes=2"),
    "masked_ordered": (
        "writer_masked",
        (),
        "--bound=False --ordered=left_to_right,confidence,random --ordered_rows=4",
    ),
    "masked_texts": (
        "writer_masked",
        ("writer_ar",),
        "--bound=False --samples=4 --judge=runs/writer_ar --match=4,8,16",
    ),
    "masked_tasks": (
        "writer_masked",
        (),
        "--bound=False --tasks=cats,cat_texts,cat_words --task_path=tasks --masks=16",
    ),
    "uniform": ("writer_uniform", (), "--bins=10 --samples=4 --match=4"),
    "paper": ("writer_paper", (), "--rows=16 --passes=3"),
    "ar": ("writer_ar", (), "--samples=4 --match=4,8 --temperature=0.8"),
    "ar_tasks": (
        "writer_ar",
        (),
        "--bound=False --tasks=cats,cat_texts,cat_words,hellaswag,mmlu_val --task_path=tasks"
        " --task_data=tasks",
    ),
    "other_text": ("writer_masked", ("corpora",), "--corpus=corpora/sums --rows=-1 --bins=5"),
    "documents_reset": ("documents_reset", (), "--ordered=confidence --ordered_rows=3"),
    "shifted": ("adapt", (), "--ordered=left_to_right --ordered_rows=3"),
    "mixture": ("mixture", (), "--samples=2 --order=low_confidence --block=16 --steps=16 --match=4,8"),
    "tokenizer_json": ("tokenizer_json", (), "--samples=2 --match=2"),
}

FIT = "--data=runs.csv --jobs=1 --figures=False --bootstrap=20 --out=fit"
SCALING = {
    "tables": "tables",
    "plan_flops": "plan --flops=1e21",
    "plan_text": "plan --unique_tokens=1B --flops=1e21",
    "plan_gpus": "plan --gpus=8 --days=3 --price=2 --gpu=H200",
    "plan_params": "plan --params=1B --epochs=4 --unique_tokens=10B",
    "fit": f"fit {FIT}",
    "fit_repeats": "fit --data=repeats.csv --laws=eq15 --bootstrap=0 --leave_out=False --jobs=1"
    " --figures=False --out=fit2",
}
