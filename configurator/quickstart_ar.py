# The autoregressive twin of quickstart: same network, half the tokens, after which it begins to know its text
# by heart.
# Hardware: two CPU cores, about X minutes. Expect about X bits/byte.

from configurator.quickstart import *

run_dir = "runs/quickstart_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
lr = 6e-3
steps = 500
