# The autoregressive twin of shakespeare_cpu: same network, same text. It learns sooner, so a third of the
# steps.
# Hardware: two CPU cores, about seven minutes. Expect 1.46 nats per byte.
from configurator.shakespeare_cpu import *

run_dir = "runs/shakespeare_cpu_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
steps = 1500
eval_every = 500
