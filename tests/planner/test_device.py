from __future__ import annotations

from collections import Counter

import pytest

from fedpeft.core.errors import ConfigError, RequestError
from fedpeft.planner.device import DEFAULT, Profile, as_device, load_devices, load_machines, lost

CLIENTS = [f"client-{i:03d}" for i in range(10)]

PHONE = """
[profile.phone]
flops_per_s = 5.0e10
memory_bytes = 4_000_000_000
up_bytes_per_s = 6.0e5
down_bytes_per_s = 2.5e6
latency_s = 0.08
availability = 0.9
"""
LAPTOP = "[profile.laptop]\n"


def devices(tmp_path, text):
    path = tmp_path / "devices.toml"
    path.write_text(text)
    return path


def test_explicit_profiles_and_defaults(tmp_path):
    lines = "".join(f'{c} = "{"phone" if i < 3 else "laptop"}"\n' for i, c in enumerate(CLIENTS))
    found = load_devices(devices(tmp_path, PHONE + LAPTOP + "[clients]\n" + lines), CLIENTS)
    assert found["client-002"] == Profile("phone", 5e10, 4_000_000_000, 6e5, 2.5e6, 0.08, 0.9)
    assert found["client-003"] == Profile("laptop")  # what the table leaves out is the default's
    assert list(found) == CLIENTS


def test_one_profile_without_clients_is_everybodys(tmp_path):
    found = load_devices(devices(tmp_path, "[profile.only]\nlatency_s = 0\n"), CLIENTS)
    assert set(found.values()) == {Profile("only", latency_s=0.0)}


def test_shares_are_exact_seeded_and_independent_of_the_order_of_clients(tmp_path):
    path = devices(tmp_path, PHONE + LAPTOP + "[clients]\nassign = {phone = 0.25, laptop = 0.75}\n")
    first = load_devices(path, CLIENTS, seed=1)
    # 2.5 and 7.5 of ten: equal remainders, the one left over goes to the first name
    assert Counter(p.name for p in first.values()) == {"phone": 2, "laptop": 8}
    assert first == load_devices(path, CLIENTS[::-1], seed=1)
    others = [load_devices(path, CLIENTS, seed=s) for s in range(2, 6)]
    assert any(other != first for other in others)


def test_all_problems_come_at_once_with_the_nearest_key(tmp_path):
    text = """
[profil.x]
[profile.phone]
flop_per_s = 1.0
latency_s = -1
availability = 1.5
memory_bytes = "much"
[clients]
client-000 = "fone"
client-01 = "phone"
"""
    with pytest.raises(ConfigError) as caught:
        load_devices(devices(tmp_path, text), CLIENTS[:2])
    said = str(caught.value)
    for part in (
        "'profil' is unknown; did you mean 'profile'?",
        "'flop_per_s' is unknown; did you mean 'flops_per_s'?",
        "profile.phone.latency_s is -1",
        "profile.phone.availability is 1.5",
        "profile.phone.memory_bytes is 'much'",
        "'fone' is unknown; did you mean 'phone'?",
        "'client-01' is unknown; did you mean 'client-001'?",
        "no profile for client-001",
    ):
        assert part in said, part
    assert len(caught.value.problems) == 8


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ("", "has 2 profiles and no \\[clients\\]"),
        ("[clients]\nassign = {phone = 0.5, laptop = 0.6}", "sum to 1.1; make it 1"),
        ("[clients]\nassign = {phone = 0.5, tablet = 0.5}", "'tablet' is unknown; known: laptop, phone"),
        ("[clients]\nassign = {phone = -0.5, laptop = 1.5}", "assign.phone is -0.5"),
        ("[clients]\nassign = {phone = 0.5, laptop = 0.5}\nclient-000 = 'phone'", "use one of the two ways"),
    ],
)
def test_wrong_assignments(tmp_path, clients, message):
    with pytest.raises(ConfigError, match=message):
        load_devices(devices(tmp_path, PHONE + LAPTOP + clients), CLIENTS)


@pytest.mark.parametrize("load", [lambda path: load_devices(path, CLIENTS), load_machines])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device = 5", r"device is 5; write a table \[\[device\]\] for each machine"),
        ("[device]\nname = 'a'", r"device is \{'name': 'a'\}; write a table \[\[device\]\]"),
        ("device = ['a']", r"the 1\. \[\[device\]\] has no name"),
        ("profile = 5", r"profile is 5; write a table such as \[profile\.phone\]"),
        ("profile = 5\n[[device]]\nname = 'a'", "profile is 5; write a table"),
        ("profile = [1]\n[[device]]\nname = 'a'", r"profile is \[1\]; write a table"),
    ],
)
def test_what_is_no_table_is_told(tmp_path, load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(devices(tmp_path, text))


def test_missing_file_wrong_toml_and_no_profile(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.toml: No such file"):
        load_devices(tmp_path / "absent.toml", CLIENTS)
    with pytest.raises(RequestError, match=r"is not TOML.*line 1"):
        load_devices(devices(tmp_path, "profile = = 3"), CLIENTS)
    with pytest.raises(ConfigError, match="defines no profile"):
        load_devices(devices(tmp_path, ""), CLIENTS)


def test_problems_of_devices_are_told_in_the_units_of_their_file(tmp_path):
    text = """
[[device]]
name = "box"
memory = 2
tflop = 1
example = 3
tflops = -1
up_mbps = "fast"
context_gb = 0.1
context_bytes = 5
memory_gb = 2
memory_bytes = 2_000_000_000
[profile.phone]
memory_gb = 2
"""
    with pytest.raises(ConfigError) as caught:
        load_devices(devices(tmp_path, text + "[clients]\nassign = {box = 1.0}\n"), CLIENTS)
    said = str(caught.value)
    for part in (
        "device.box.'memory' is unknown; did you mean 'memory_gb'?",
        "device.box.'tflop' is unknown; did you mean 'tflops'?",
        "device.box.'example' is unknown; did you mean 'examples'?",
        "device.box.tflops is -1; give a number above 0",
        "device.box.up_mbps is 'fast'; give a finite number",
        "device.box.memory_gb stands beside memory_bytes",
        "device.box.context_gb stands beside context_bytes",
        "profile.phone.'memory_gb' is unknown; did you mean 'memory_bytes'?",
    ):
        assert part in said, part
    assert len(caught.value.problems) == 8


def test_a_measured_file_gets_into_a_run_by_a_table_of_clients(tmp_path):
    mine = Profile("mine", flops_per_s=2e12, memory_bytes=4_000_000_000, peak_ratio=1.25, step_overhead_s=0.5)
    text = as_device(mine, 9)
    assert "# bandwidth unknown: 10 Mbit/s up, 50 down are assumed\n" in text and "# tflops are of the shape" in text
    path = devices(tmp_path, text + "[clients]\nassign = {mine = 1.0}\n")
    assert load_machines(path) == {"mine": (mine, 9)}
    assert set(load_devices(path, CLIENTS).values()) == {mine}
    known = as_device(Profile("known", up_bytes_per_s=1e6))
    assert "# bandwidth down unknown: 50 Mbit/s are assumed" in known and "# tflops" not in known


def test_lost_follows_the_availability_and_the_place():
    flaky = Profile("flaky", availability=0.7)
    draws = [lost(flaky, 0, c, n, a) for c in CLIENTS for n in range(100) for a in range(2)]
    # 2,000 draws: 600 expected, standard deviation 20.5; five of them on either side
    assert 498 < sum(draws) < 702
    assert draws == [lost(flaky, 0, c, n, a) for c in CLIENTS for n in range(100) for a in range(2)]
    assert draws != [lost(flaky, 1, c, n, a) for c in CLIENTS for n in range(100) for a in range(2)]
    assert draws[0::2] != draws[1::2]  # a repetition draws anew
    assert not any(lost(DEFAULT, 0, c, n) for c in CLIENTS for n in range(100))
