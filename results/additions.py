"""Print all additions of two numbers below 100 as question-answer pairs, for configurator/sft_addition.py."""

import json

for a in range(100):
    for b in range(100):
        print(json.dumps(dict(prompt=f"{a}+{b}=", answer=str(a + b))))
