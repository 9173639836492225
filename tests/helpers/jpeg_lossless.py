"""A writer of lossless JPEG (ITU-T T.81, process 14), for any predictor and point transform: slow and plain."""

import numpy as np


def encode(pixels: np.ndarray, predictor: int = 1, shift: int = 0, precision: int = 16, restart_rows: int = 0) -> bytes:
    """One grey image, `(row, column)`, as a code stream; predictions begin anew every so many rows, if any."""
    rows, columns = pixels.shape
    step = restart_rows or rows
    strips = [pixels[row : row + step].astype(np.int64) >> shift for row in range(0, rows, step)]
    differences = [_differences(strip, predictor, 1 << (precision - shift - 1)) for strip in strips]
    lengths = _code_lengths(np.bincount([_category(d) for strip in differences for d in strip], minlength=17))
    codes, code, order = {}, 0, sorted((length, category) for category, length in enumerate(lengths) if length)
    for n, (length, category) in enumerate(order):
        if n:
            code = (code + 1) << (length - order[n - 1][0])
        codes[category] = f"{code:0{length}b}"
    coded = b"".join(
        (bytes([0xFF, 0xD0 + (n - 1) % 8]) if n else b"") + _coded(strip, codes) for n, strip in enumerate(differences)
    )
    counts = bytes(sum(length == n for length, _ in order) for n in range(1, 17))
    table = b"\x00" + counts + bytes(category for _, category in order)
    frame = bytes([precision]) + rows.to_bytes(2, "big") + columns.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    restarts = _segment(0xDD, (restart_rows * columns).to_bytes(2, "big")) if restart_rows else b""
    scan = _segment(0xDA, bytes([1, 1, 0, predictor, 0, shift]))
    return b"\xff\xd8" + _segment(0xC3, frame) + _segment(0xC4, table) + restarts + scan + coded + b"\xff\xd9"


def _differences(values: np.ndarray, predictor: int, first: int) -> list[int]:
    """From what each pixel is predicted to be, modulo 2^16, `-2^15` to `2^15 - 1`."""
    found = []
    for row, column in np.ndindex(values.shape):
        left = int(values[row, column - 1]) if column else None
        above = int(values[row - 1, column]) if row else None
        if left is None and above is None:
            guess = first
        elif left is None or above is None:
            guess = above if left is None else left
        else:
            corner = int(values[row - 1, column - 1])
            guess = {
                1: left,
                2: above,
                3: corner,
                4: left + above - corner,
                5: left + ((above - corner) >> 1),
                6: above + ((left - corner) >> 1),
                7: (left + above) >> 1,
            }[predictor]
        found.append((int(values[row, column]) - guess + 2**15) % 2**16 - 2**15)
    return found


def _category(difference: int) -> int:
    return 16 if difference == -(2**15) else abs(difference).bit_length()


def _coded(differences: list[int], codes: dict[int, str]) -> bytes:
    bits = []
    for difference in differences:
        category = _category(difference)
        bits.append(codes[category])
        if 0 < category < 16:
            bits.append(f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")


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
