import pytest

from wsm_ext.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (1024, 1024),
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("12GiB", 12 << 30),
        ("12gib", 12 << 30),
        ("512 MB", 512 * 10**6),
        (" 512 MiB ", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("0.1KB", 100),
        ("3k", 3 << 10),
        ("2G", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1TiB", 1 << 40),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes_are_parsed(value, size):
    assert parse_bytes(value, "host_memory") == size


@pytest.mark.parametrize(
    "value",
    [
        "",
        "GiB",
        "12 GiBs",
        "-1GiB",
        "1e9",
        "12,5GiB",
        "iB",
        "5iB",
        "1 2GiB",
        "auto",
        "nan",
        "\u0661GiB",
    ],
)
def test_text_that_is_no_size_is_refused_by_name(value):
    with pytest.raises(ValueError, match="host_memory must be a number of bytes"):
        parse_bytes(value, "host_memory")


@pytest.mark.parametrize("value", [True, 1.5, None, [1]])
def test_other_types_are_refused_by_name(value):
    with pytest.raises(TypeError, match="host_memory must be a size"):
        parse_bytes(value, "host_memory")


@pytest.mark.parametrize("value", [-1, 2**63, "9000000000GiB"])
def test_sizes_out_of_range_are_refused_by_name(value):
    with pytest.raises(ValueError, match="host_memory"):
        parse_bytes(value, "host_memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (12 << 30, "12.0 GiB"),
        (20_537_426_944, "19.1 GiB"),
        (5 << 60, "5120.0 PiB"),
    ],
)
def test_sizes_are_formatted(size, text):
    assert format_bytes(size) == text
