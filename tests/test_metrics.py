"""metrics: every number against brute force or a case whose answer is known."""
import numpy as np
import pytest

from tmlib import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def film(rng, n=3, T=21, size=16):
    return rng.integers(0, 256, (n, T, size, size, 3), dtype=np.uint8)


# ---- lips --------------------------------------------------------------------------------------

def test_pearson(rng):
    a, b = rng.standard_normal((2, 50))
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.pearson(a, 3 * a + 2) == pytest.approx(1) and metrics.pearson(a, -a) == pytest.approx(-1)
    assert metrics.pearson(a, np.full(50, 0.7)) == 0                     # a still mouth follows nothing
    assert metrics.lip_r(np.stack([a, b]), np.stack([a, a])).tolist() == pytest.approx([1, np.corrcoef(a, b)[0, 1]])


@pytest.mark.parametrize("late", [-4, -1, 0, 1, 3, 5])
def test_lip_offset_is_positive_when_the_picture_is_late(rng, late):
    mouth = rng.standard_normal((4, 60))
    truth = mouth[:, 10:50]
    read = mouth[:, 10 - late:50 - late] + 0.1 * rng.standard_normal((4, 40))               # what was said `late` frames ago
    assert metrics.lip_offset(read, truth) == late


@pytest.mark.parametrize("df, t", [(1, 12.706), (2, 4.303), (7, 2.365), (30, 2.042), (1000, 1.962)])
def test_students_t_is_the_textbooks(df, t):
    assert metrics.student_t(df) == pytest.approx(t, abs=6e-4)


def test_the_interval_of_a_mean_is_the_textbooks(rng):
    x = rng.normal(5, 2, 40)
    mean, lo, hi = metrics.average(x)
    assert mean == pytest.approx(x.mean()) and hi - mean == pytest.approx(mean - lo) == pytest.approx(2.0227 * x.std(ddof=1) / np.sqrt(40), rel=1e-4)
    assert metrics.average([2.0, 2.0, 2.0]) == (2, 2, 2) and metrics.average([3.0]) == (3, 3, 3)
    assert metrics.interval("x", np.array([1.0, 1.0])) == {"x": 1, "x_lo": 1, "x_hi": 1}


def test_a_share_stays_a_share():
    right = np.array([True] * 19 + [False])
    assert metrics.average(right)[::2] == (0.95, 1.0) and metrics.average(right)[1] == metrics.average(right.astype(float))[1]
    assert metrics.average(~right)[1] == 0 and metrics.average(right.astype(float))[2] > 1


@pytest.mark.parametrize("groups, clips", [(3, 4), (8, 11)])
def test_an_interval_holds_the_truth_in_95_of_100_worlds(rng, groups, clips):
    """Few voices, each with clips that resemble one another: where a bootstrap's would hold it in 75 and in 88."""
    who, inside = np.repeat(np.arange(groups), clips), []
    for _ in range(1000):
        _, lo, hi = metrics.average(rng.normal(0, 1, groups)[who] + rng.normal(0, 1, groups * clips), who)
        inside.append(lo <= 0 <= hi)
    assert 0.93 <= np.mean(inside) <= 0.97


def test_clips_of_one_voice_count_together(rng):
    """As many voices as draws, however many clips."""
    voices = rng.normal(0, 1, 30)
    alone, who = metrics.average(voices), np.repeat(np.arange(30), 20)
    assert metrics.average(np.repeat(voices, 20), who) == pytest.approx(alone)
    _, lo, hi = metrics.average(np.repeat(voices, 20))
    assert hi - lo < 0.4 * (alone[2] - alone[1])
    assert metrics.average(voices, ["one"] * 30) == alone                                      # of a single voice: its clips


def test_jackknife(rng):
    """Of a mean it is the textbook's interval; of a Fréchet distance it lies around the number itself."""
    x = rng.normal(3, 1, 50)
    found = metrics.jackknife("x", x.mean(), metrics.left_out(lambda some: x[some].mean(), np.arange(50)))
    assert found["x"] == x.mean() and found["x_hi"] - found["x"] == pytest.approx(metrics.student_t(49) * x.std(ddof=1) / np.sqrt(50)) == found["x"] - found["x_lo"]
    inside = []
    for _ in range(60):
        a, b = rng.normal(0, 1, (40, 30, 3)), rng.normal(0.2, 1, (40, 30, 3))
        far = lambda some: metrics.frechet(a[some].reshape(-1, 3), b[some].reshape(-1, 3))
        found = metrics.jackknife("f", far(np.arange(40)), metrics.left_out(far, np.repeat(np.arange(20), 2)))
        assert found["f"] == far(np.arange(40)) and found["f_hi"] - found["f_lo"] < 0.25
        inside.append(found["f_lo"] <= 0.12 <= found["f_hi"])
    assert 0.85 <= np.mean(inside) <= 1


def test_ratio(rng):
    bottom = rng.uniform(1, 3, 30)
    assert metrics.ratio(2 * bottom, bottom) == pytest.approx((2, 2, 2))          # the same clips, top and bottom
    top = rng.uniform(1, 3, 30)
    ratio, lo, hi = metrics.ratio(top, bottom)
    assert ratio == pytest.approx(top.mean() / bottom.mean()) and lo < ratio < hi


# ---- motion ------------------------------------------------------------------------------------

def test_frame_difference(rng):
    video = film(rng)
    by_hand = [[np.abs(v[t + 1].astype(float) - v[t]).mean() for t in range(20)] for v in video]
    np.testing.assert_allclose(metrics.frame_difference(video), by_hand)


@pytest.mark.parametrize("each", [1, 4])
def test_displacement_is_how_far_a_head_moves(rng, each):
    """Parts of a pixel, and in any size; what has no direction is none."""
    y, x = np.mgrid[:64 * each, :64 * each] / each
    head = lambda dx, dy: 120 + 60 * np.exp(-((x - 32 - dx) ** 2 + (y - 28 - dy) ** 2) / 90)
    t = np.arange(40)
    video = np.stack([head(0.05 * k, -0.02 * k) for k in t]).astype(np.uint8)[None, ..., None].repeat(3, -1)
    face = np.broadcast_to(np.float32([16, 12, 48, 56]) * each, (1, 40, 4))
    moved = metrics.displacement(video, face)
    assert moved.shape == (1, 23, 2) and np.abs(moved - [0.8, -0.32]).max() < 0.1
    assert metrics.movement(video, face) == pytest.approx(0.86, abs=0.05)
    still = np.repeat(video[:, :1] // 2, 40, axis=1)
    flickers = still + (20 * (t % 4)).astype(np.uint8)[:, None, None, None]
    noisy = still + rng.integers(0, 20, still.shape).astype(np.uint8)
    assert metrics.movement(still, face) == 0 and metrics.movement(flickers, face) < 0.02 and metrics.movement(noisy, face) < 0.25
    assert metrics.frame_difference(flickers).mean() > 5


@pytest.mark.parametrize("chunk, count", [(1, 4), (2, 5), (3, 7), (7, 3)])
def test_borders_lie_where_chunks_meet(chunk, count):
    sizes = [1 + 4 * (chunk - 1)] + [4 * chunk] * (count - 1)            # frames of chunk 0, and of every other
    owner = np.repeat(np.arange(count), sizes)
    np.testing.assert_array_equal(metrics.borders(len(owner), chunk), np.flatnonzero(np.diff(owner)))


def test_blinks_are_counted_and_other_motion_is_not():
    video, face = np.full((4, 32, 40, 40, 3), 100, np.uint8), np.broadcast_to(np.float32([0, 0, 40, 40]), (4, 32, 4))
    video[0] += (30 * (np.arange(32) % 2)).astype(np.uint8)[:, None, None, None]           # all of it flickers
    for shut in (slice(1, 3), slice(20, 23)):
        video[1, shut, 12:20] = 160                                      # the lids go down, and up again
    video[2, 5:8, 24:] = 160                                             # as much, at the mouth
    video[3, 9:, 12:20] = 160                                            # a glance, which stays
    eyes = np.broadcast_to(np.float32([0, 11, 40, 20]), face.shape)
    assert metrics.eye_moves(metrics.eye_change(video, eyes, face), fps=16).tolist() == [0, 1.0, 0, 0.5]


def test_border_ratio():
    video = np.zeros((2, 33, 8, 8, 3), np.uint8)                         # chunks of 3: frames 0-8, 9-20, 21-32
    level = np.arange(33) + 2 * (np.arange(33) >= 9) + 2 * (np.arange(33) >= 21)            # 1 inside, 3 across
    video[0] = level[:, None, None, None]
    video[1] = np.arange(33)[:, None, None, None]
    np.testing.assert_allclose(metrics.border_ratio(video, 3), [3, 1])
    assert metrics.border_ratio(np.zeros_like(video), 3).tolist() == [0, 0]                 # a still picture has no borders


def test_seam_ratio_sees_chunks_and_not_the_codecs_clock():
    frame = np.arange(33)                                                # frame 0, then groups of four
    group = (frame + 3) // 4
    video = np.stack([frame + 2 * group, frame + 2 * group + 6 * (group >= 3)])           # 3 across groups; 9 across the first seam
    video = np.broadcast_to(video[..., None, None, None], (2, 33, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(metrics.seam_ratio(video, 3), [1, 2])
    assert metrics.border_ratio(video, 3)[0] > 2                         # the codec's own jumps are in this one
    assert metrics.seam_ratio(np.zeros_like(video), 3).tolist() == [0, 0]


# ---- fidelity ----------------------------------------------------------------------------------

def test_psnr(rng):
    a = film(rng)
    b = np.where(a > 127, a - 5, a + 5).astype(np.uint8)
    np.testing.assert_allclose(metrics.psnr(a, b), 10 * np.log10(255 ** 2 / 25), rtol=1e-6)
    np.testing.assert_array_equal(metrics.psnr(a, b), metrics.psnr(b, a))                   # no wrap-around of uint8
    assert (metrics.psnr(a, a) > 100).all()


def test_ssim(rng):
    a = film(rng, 1, 4, 24)[0]
    assert metrics.ssim(a, a) == pytest.approx(1)
    noisy = np.clip(a + rng.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    more = np.clip(a + rng.normal(0, 90, a.shape), 0, 255).astype(np.uint8)
    assert 1 > metrics.ssim(a, noisy) > metrics.ssim(a, more) > 0
    assert metrics.ssim(a, noisy) == pytest.approx(metrics.ssim(noisy, a))
    assert abs(metrics.ssim(a, film(rng, 1, 4, 24)[0])) < 0.1
    flat = lambda v: np.full((1, 8, 8, 3), v, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert metrics.ssim(flat(100), flat(150)) == pytest.approx((2 * 100 * 150 + c1) / (100 ** 2 + 150 ** 2 + c1), rel=1e-3)
    assert metrics.ssim(a[:, :23, :19], a[:, :23, :19]) == pytest.approx(1)                 # sides that 8 does not divide


def test_frechet(rng):
    a = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet(a, a + 2.0) == pytest.approx(4 * 6)           # |mean difference|^2
    z = rng.standard_normal((4000, 3))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T      # covariance exactly 1
    s1, s2 = np.array([1.0, 2, 3]), np.array([2.0, 2, 0.5])
    assert metrics.frechet(z * s1, z * s2) == pytest.approx(((s1 - s2) ** 2).sum())         # commuting Gaussians
    b = rng.standard_normal((300, 6))
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a)) and metrics.frechet(a, b) > 0.1


# ---- drift -------------------------------------------------------------------------------------

def test_lab_of_known_colours():
    known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 255, 0): (87.74, -86.18, 83.18),
             (0, 0, 255): (32.30, 79.19, -107.86), (119, 119, 119): (50.03, 0, 0)}
    frames = np.stack([np.full((4, 4, 3), c, np.uint8) for c in known])
    np.testing.assert_allclose(metrics.lab(frames), list(known.values()), atol=0.1)


def test_lab_is_the_mean_of_the_picture():
    two = np.zeros((1, 2, 4, 3), np.uint8)
    two[:, 0] = 255
    np.testing.assert_allclose(metrics.lab(two), [[50, 0, 0]], atol=0.1)


def test_sharpness(rng):
    frames = film(rng, 1, 2)[0]
    g = frames.astype(float).mean(-1)
    at = lambda x, i, j: abs(4 * x[i, j] - x[i - 1, j] - x[i + 1, j] - x[i, j - 1] - x[i, j + 1])
    by_hand = [np.mean([at(x, i, j) for i in range(1, 15) for j in range(1, 15)]) for x in g]
    np.testing.assert_allclose(metrics.sharpness(frames), by_hand, rtol=1e-5)
    assert metrics.sharpness(np.full((1, 8, 8, 3), 9, np.uint8)) == 0


def test_cosine_distance(rng):
    a = rng.standard_normal((5, 4))
    np.testing.assert_allclose(metrics.cosine_distance(a, 3 * a), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.cosine_distance(a, -a), 2)
    np.testing.assert_allclose(metrics.cosine_distance(np.eye(3), np.array([1.0, 0, 0])), [0, 1, 1])
    assert metrics.cosine_distance(np.zeros((1, 3)), np.ones(3)) == 1    # of nothing: no division by zero


def test_paired_ratios_do_not_see_what_both_suffer():
    load = np.array([1, 1, 5, 1, 3, 1, 1, 9.0])                          # a busy machine slows both of a turn
    found = metrics.paired("x", 2 * load, load)
    assert found == {"x": 2.0, "x_lo": 2.0, "x_hi": 2.0}
    uneven = metrics.paired("x", [2, 2, 2, 20], [1, 1, 2, 1])
    assert uneven["x"] == 2 and uneven["x_lo"] < 2 < uneven["x_hi"]


def test_latency():
    made = metrics.latency([0.1] * 50 + [0.2] * 50 + [0.3], "chunk")
    assert set(made) == {"chunk_ms_p50", "chunk_ms_p95"} and made["chunk_ms_p50"] == pytest.approx(200)
    assert metrics.latency(list(np.arange(101) / 1000), "x") == pytest.approx({"x_ms_p50": 50, "x_ms_p95": 95})
