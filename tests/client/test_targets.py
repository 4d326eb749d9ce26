"""Valid targets, and the gRPC targets made of them."""

import pytest
from img2img_client.targets import parse_target


@pytest.mark.parametrize(
    ("target", "name", "secure", "several", "listed"),
    [
        ("localhost:50051", "localhost:50051", False, False, False),
        ("http://gpu-box:50051/", "gpu-box:50051", False, False, False),
        ("https://gpu-box:50051", "gpu-box:50051", True, False, False),
        ("unix:/run/a,b.sock", "unix:/run/a,b.sock", False, False, False),
        ("ipv4:10.0.0.1:50051", "ipv4:10.0.0.1:50051", False, False, False),
        ("ipv4:10.0.0.1:50051,10.0.0.2:50051", "ipv4:10.0.0.1:50051,10.0.0.2:50051", False, True, True),
        ("ipv6:[::1]:1,[::2]:1", "ipv6:[::1]:1,[::2]:1", False, True, True),
        ("dns:///img2img:50051", "dns:///img2img:50051", False, True, False),
        ("dns://10.0.0.53/img2img:50051", "dns://10.0.0.53/img2img:50051", False, True, False),
        (["gpu-box:50051"], "gpu-box:50051", False, False, False),
        (["10.0.0.1:50051", "10.0.0.2:50052"], "ipv4:10.0.0.1:50051,10.0.0.2:50052", False, True, True),
        (("https://10.0.0.1:1", "https://10.0.0.2:1/"), "ipv4:10.0.0.1:1,10.0.0.2:1", True, True, True),
        ("10.0.0.1:50051,10.0.0.2:50052", "ipv4:10.0.0.1:50051,10.0.0.2:50052", False, True, True),
        (["localhost:1", "localhost:2"], "ipv4:127.0.0.1:1,127.0.0.1:2", False, True, True),
        (["[::1]:1", "[2001:db8::1]:2"], "ipv6:[::1]:1,[2001:db8::1]:2", False, True, True),
    ],
)
def test_one_server_or_several(target: str, name: str, secure: bool, several: bool, listed: bool) -> None:
    found = parse_target(target)
    assert (found.name, found.secure, found.several, found.listed) == (name, secure, several, listed)
    assert found.shown == (target if isinstance(target, str) else ",".join(target))
    for balance in (True, False):
        assert parse_target(target, balance).several is balance


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ([], "empty list"),
        (["gpu-1:50051", "gpu-2:50051"], "'gpu-1:50051' in a list.*dns:///name:port"),
        (["10.0.0.1:1", "gpu-2:1"], "'gpu-2:1' in a list"),
        (["10.0.0.1:1", "localhost.example.org:1"], "in a list"),
        (["10.0.0.1:1", "unix:/a"], "in a list"),
        (["10.0.0.1:1", "dns:///gpu:1"], "in a list"),
        (["10.0.0.1:1", ""], "in a list"),
        (["10.0.0.1:1", "[::1]:1"], "cannot be mixed"),
        (["https://10.0.0.1:1", "10.0.0.2:1"], "the same scheme"),
        (["https://10.0.0.1:1", "http://10.0.0.2:1"], "the same scheme"),
    ],
)
def test_targets_without_load_balancing_are_reported(target: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_target(target)
    assert "target" in str(caught.value)
