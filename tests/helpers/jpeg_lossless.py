"""A writer of lossless JPEG (ITU-T T.81, process 14), for any predictor and point transform: slow and plain."""

import numpy as np


def encode(pixels: np.ndarray, predictor: int = 1, shift: int = 0, precision: int = 16) -> bytes:
    """One grey image, `(row, column)`, as a code stream."""
    values = pixels.astype(np.int64) >> shift
    predicted = np.empty_like(values)
    for row, column in np.ndindex(values.shape):
        left = values[row, column - 1] if column else None
        above = values[row - 1, column] if row else None
        if left is None and above is None:
            guess = 1 << (precision - shift - 1)
        elif row == 0:
            guess = left
        elif column == 0:
            guess = above
        else:
            corner = values[row - 1, column - 1]
            guess = {
                1: left,
                2: above,
                3: corner,
                4: left + above - corner,
                5: left + ((above - corner) >> 1),
                6: above + ((left - corner) >> 1),
                7: (left + above) >> 1,
            }[predictor]
        predicted[row, column] = guess
    differences = (values - predicted + 2**15) % 2**16 - 2**15
    categories = [16 if d == -(2**15) else int(abs(d)).bit_length() for d in differences.flat]
    lengths = _code_lengths(np.bincount(categories, minlength=17))
    codes, code, order = {}, 0, sorted((length, category) for category, length in enumerate(lengths) if length)
    for n, (length, category) in enumerate(order):
        if n:
            code = (code + 1) << (length - order[n - 1][0])
        codes[category] = f"{code:0{length}b}"
    bits = []
    for difference, category in zip(differences.flat, categories, strict=True):
        bits.append(codes[category])
        if 0 < category < 16:
            bits.append(f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    counts = bytes(sum(length == n for length, _ in order) for n in range(1, 17))
    table = b"\x00" + counts + bytes(category for _, category in order)
    rows, columns = pixels.shape
    frame = bytes([precision]) + rows.to_bytes(2, "big") + columns.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    scan = bytes([1, 1, 0, predictor, 0, shift])
    parts = [b"\xff\xd8", _segment(0xC3, frame), _segment(0xC4, table), _segment(0xDA, scan), coded, b"\xff\xd9"]
    return b"".join(parts)


def _segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _code_lengths(counts: np.ndarray) -> list[int]:
    """Huffman's, with a code more than there are categories, since none may consist of ones only."""
    groups = [(int(count), [category]) for category, count in enumerate(counts) if count] + [(0, [17])]
    lengths = dict.fromkeys(range(18), 0)
    while len(groups) > 1:
        groups.sort(key=lambda group: group[0], reverse=True)
        (a, first), (b, second) = groups.pop(), groups.pop()
        for category in first + second:
            lengths[category] += 1
        groups.append((a + b, first + second))
    # The spare code is made the last of the longest by leaving it out.
    return [lengths[category] for category in range(17)]
