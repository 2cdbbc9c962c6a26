"""The model sizes of the Quokka paper."""

# The ladder of the Quokka paper's Table 6: (12·n_layer·d_model² in millions, as that table prints it,
# d_model, head_dim, n_head, n_layer).
LADDER = [
    (1, 128, 32, 4, 3), (2, 224, 32, 7, 4), (5, 288, 32, 7, 5), (7, 320, 32, 10, 6), (14, 448, 32, 7, 6),
    (25, 512, 64, 8, 8), (36, 576, 64, 9, 9), (49, 640, 64, 10, 10), (64, 640, 64, 10, 13),
    (79, 640, 64, 10, 16), (85, 768, 64, 12, 12), (106, 768, 64, 12, 15), (127, 768, 64, 12, 18),
    (135, 896, 64, 14, 14), (154, 896, 64, 14, 16), (173, 896, 64, 14, 18), (201, 1024, 64, 16, 16),
    (226, 1024, 64, 16, 18), (252, 1024, 64, 16, 20), (354, 1280, 128, 10, 18), (413, 1280, 128, 10, 21),
    (428, 1408, 128, 11, 18), (472, 1280, 128, 10, 24), (500, 1408, 128, 11, 21), (538, 1536, 128, 12, 19),
    (571, 1408, 128, 11, 24), (623, 1536, 128, 12, 22), (708, 1536, 128, 12, 25), (771, 1792, 128, 14, 20),
    (886, 1792, 128, 14, 23), (1002, 1792, 128, 14, 26), (1107, 2048, 128, 16, 22),
    (1250, 2176, 128, 17, 22), (1258, 2048, 128, 16, 25), (1409, 2048, 128, 16, 28),
    (1420, 2176, 128, 17, 25), (1529, 2304, 128, 18, 24), (1591, 2176, 128, 17, 28),
    (1784, 2304, 128, 18, 28), (2038, 2304, 128, 18, 32), (2045, 2560, 128, 20, 26),
    (2359, 2560, 128, 20, 30), (2674, 2560, 128, 20, 34), (3121, 2688, 128, 21, 36),
    (3426, 2816, 128, 22, 36), (3744, 2944, 128, 23, 36), (4077, 3072, 128, 24, 36),
    (6166, 3584, 128, 28, 40), (8456, 4096, 128, 32, 42), (10682, 4352, 128, 32, 47),
    (11211, 4608, 128, 36, 44), (11976, 4608, 128, 32, 47), (13343, 4864, 128, 32, 47),
    (14653, 4992, 128, 32, 49), (14785, 5120, 128, 40, 47),
]


def swiglu_width(d_model):
    """The SwiGLU width with the parameters of a 4·d MLP, rounded down to a multiple of 64."""
    return 64 * (8 * d_model // 3 // 64)


def ladder_params(d_model, head_dim, n_head, n_layer):
    """N of the paper's figures and fits: GPT-2's padded vocabulary, tied, without norms."""
    return 50304 * d_model + n_layer * (4 * d_model * n_head * head_dim + 3 * d_model * swiglu_width(d_model))


def ladder(name):
    """The shape called e.g. '1086M' (N of the figures) or '1002M' (Table 6's column) as keyword arguments.

    '1.1B' finds the row that rounds to it if there is just one. The figures' N comes first.
    """
    text = str(name).strip().upper()
    figures = [round(ladder_params(*row) / 1e6) for _, *row in LADDER]
    column = [count for count, *_ in LADDER]
    for millions in (figures, column):
        rows = [row for n, (_, *row) in zip(millions, LADDER) if is_called(n, text)]
        if len(rows) > 1:
            break
        if len(rows) == 1:
            d_model, head_dim, n_head, n_layer = rows[0]
            return dict(d_model=d_model, head_dim=head_dim, n_head=n_head, n_layer=n_layer)
    names = ", ".join(f"{round(ladder_params(*row) / 1e6)}M" for _, *row in LADDER)
    raise ValueError(f"no single model of the ladder is called '{name}'; there are {names}")


def is_called(millions, text):
    """Whether so many million parameters are called '1086M', or e.g. '1.1B', rounded to the text's digits."""
    if text.endswith("M"):
        return text[:-1].isdecimal() and millions == int(text[:-1])
    digits = len(text.partition(".")[2]) - 1 if "." in text else 0
    return text == f"{millions / 1000:.{digits}f}B"
