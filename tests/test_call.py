"""A live call: caller and server in one event loop, over real WebRTC on the loopback interface. No browser, no other network."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import aiohttp
import aioice.ice
import av
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from aiortc.rtcrtpreceiver import RTCRtpReceiver
from PIL import Image

from tmlib import call, config
from tmlib.config import UserError

SIZE, TONE, PATIENCE = 64, 1000, 60              # pixels; Hz of the avatar's bursts; s, of a loaded machine
TESTS = Path(__file__).parent
FLASHES = lambda n: n % 16 in (10, 11)           # the frames that are bright above and have a burst as their sound


@dataclass
class Event:
    kind: str
    at: float = 0.0
    text: str = ""


class Fake:
    """A conversation whose lower half spells the frame's number in eight stripes, and whose upper half flashes with the sound."""

    size = SIZE

    def __init__(self, fails_at=None, error=UserError("the models ran out of memory; hang up other programs")):
        self.events, self.heard, self.n, self.fails_at, self.error, self.state = [], [], 0, fails_at, error, "made"

    def start(self):
        assert self.state == "made"
        self.state, self.began = "started", time.monotonic()

    def hear(self, wave):
        assert self.state == "started" and wave.dtype == np.float32 and wave.ndim == 1 and len(wave)
        self.heard.append(wave)

    def frame(self):
        assert self.state == "started"
        if self.n == self.fails_at:
            raise self.error
        n, self.n = self.n, self.n + 1
        bits = np.array([255 * (n >> bit & 1) for bit in range(8)], np.uint8).repeat(SIZE // 8)
        picture = np.broadcast_to(bits[None, :, None], (SIZE, SIZE, 3)).copy()
        picture[:SIZE // 2] = 255 * FLASHES(n)
        t = np.arange(1000) / 16000
        return picture, (0.8 * FLASHES(n) * np.sin(2 * np.pi * TONE * t)).astype(np.float32)

    def close(self):
        self.state, self.closer = "closed", threading.current_thread()


class Tone(MediaStreamTrack):
    """The caller's microphone: 440 Hz at amplitude 0.5, in 20 ms packets, in real time."""

    kind, n = "audio", 0

    async def recv(self):
        self.began = getattr(self, "began", time.monotonic())
        await asyncio.sleep(self.began + self.n / 50 - time.monotonic())
        if self.readyState != "live":
            raise MediaStreamError
        wave = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(960) + 960 * self.n) / 48000)
        frame = av.AudioFrame.from_ndarray((32767 * wave).astype(np.int16).repeat(2)[None], "s16", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 960 * self.n, Fraction(1, 48000)
        self.n += 1
        return frame


@dataclass
class Caller:
    """A browser's part: what it got."""
    http: TestClient
    pc: RTCPeerConnection = field(default_factory=lambda: RTCPeerConnection(RTCConfiguration(iceServers=[])))
    frames: dict = field(default_factory=lambda: {"video": [], "audio": []})
    told: list = field(default_factory=list)
    polite: bool = True                          # hangs up when it is told that the call has ended, as the page does

    async def offer(self, **changed):
        self.channel = self.pc.createDataChannel("events")
        self.channel.on("message", self.message)
        self.pc.addTransceiver("video", direction="recvonly")
        self.pc.addTrack(Tone())
        self.pc.on("track", lambda track: asyncio.ensure_future(self.watch(track)))
        await self.pc.setLocalDescription(await self.pc.createOffer())
        body = {"type": self.pc.localDescription.type, "sdp": self.pc.localDescription.sdp} | changed
        response = await self.http.post("/offer", json=body)
        answer = await response.json()
        if response.status == 200:
            await self.pc.setRemoteDescription(RTCSessionDescription(**answer))
        return response.status, answer

    def message(self, text):
        self.told.append(json.loads(text))
        if self.polite and self.told[-1]["kind"] == "ended":
            asyncio.ensure_future(self.pc.close())

    async def watch(self, track):
        try:
            while True:
                self.frames[track.kind].append(await track.recv())
        except MediaStreamError:
            pass


async def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


@asynccontextmanager
async def served(new, face="face.png"):
    client = TestClient(TestServer(call.application(new, face, [])))
    await client.start_server()
    callers = []

    def caller(**options):
        callers.append(Caller(client, **options))
        return callers[-1]
    try:
        yield caller
    finally:
        await asyncio.gather(*(c.pc.close() for c in callers))
        await client.close()


def number(frame):
    """-> n of a frame as it came over the network, and whether it flashes."""
    grey = frame.to_ndarray(format="gray").astype(float)
    stripes = grey[-grey.shape[0] // 4:].reshape(-1, 8, grey.shape[1] // 8)[:, :, 12:-12].mean((0, 2))
    assert ((stripes < 60) | (stripes > 195)).all(), stripes
    top = grey[12:grey.shape[0] // 2 - 24].mean()
    assert top < 60 or top > 195, top
    return sum(1 << bit for bit in range(8) if stripes[bit] > 128), top > 128


# ---------------------------------------------------------------------------------------------------- the whole call
def test_a_call_from_the_first_frame_to_the_last(monkeypatch):
    """Size, order and time stamps of the picture; sound that goes with it; what is heard; events; hanging up."""
    stamps = reports(monkeypatch)

    async def main():
        made = []
        async with served(lambda: made.append(Fake()) or made[-1]) as caller:
            one = caller()
            status, answer = await one.offer()
            assert status == 200 and answer["type"] == "answer"
            await until(lambda: made[0].n > 5, "the first frames")
            made[0].events += [Event("began", 0.25), Event("heard", 1.5, "hello"), Event("answer", 2.0004, "Good day, <you>"), Event("spoke", 2.5)]
            await until(lambda: made[0].n >= 56 and len(stamps["reports"]["video"]) > 1 and len(stamps["reports"]["audio"]) > 1
                        and sum(map(len, made[0].heard)) > 40_000, "enough of both directions")
            assert made[0].state == "started"
            await one.pc.close()
            await until(lambda: made[0].state == "closed", "the conversation's end")
            assert made[0].closer is not threading.main_thread()     # it may wait for its workers
            return one, made[0], time.monotonic()

    one, fake, ended = asyncio.run(main())
    assert {(f.width, f.height) for f in one.frames["video"]} == {(384, 384)}
    seen = [number(f) for f in one.frames["video"]]
    numbers = [n for n, _ in seen]
    assert len(seen) > 20 and all(flash == FLASHES(n) for n, flash in seen)
    first = one.frames["video"][0].pts
    assert all(f.pts - first == 5625 * (n - numbers[0]) for f, n in zip(one.frames["video"], numbers)) and numbers == sorted(set(numbers))
    assert fake.n <= 16 * (ended - fake.began) + 1                   # 16 a second, none in a hurry
    assert {(f.samples, f.sample_rate) for f in one.frames["audio"]} == {(960, 48000)}
    loudest = np.percentile([np.abs(f.to_ndarray()).max() for f in one.frames["audio"]], 97) / 32768
    assert abs(loudest - 0.8) < 0.08

    heard = np.concatenate(fake.heard)[8000:40_000]
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert abs(spectrum.argmax() / 2 - 440) < 2 and abs(np.sqrt((heard ** 2).mean()) - 0.5 / np.sqrt(2)) < 0.04

    events = [item for item in one.told if item["kind"] != "state"]
    assert events == [{"kind": "began", "at": 0.25, "text": ""}, {"kind": "heard", "at": 1.5, "text": "hello"},
                      {"kind": "answer", "at": 2.0, "text": "Good day, <you>"}, {"kind": "spoke", "at": 2.5, "text": ""}]
    assert [item["text"] for item in one.told if item["kind"] == "state"][:2] in (["listening", "speaking"], ["speaking"])

    # Lips and sound by the clock of RTCP, from which browsers align the two.
    flashes = [stamps["wall"]("video", f.pts) for f, (n, flash) in zip(one.frames["video"], seen) if flash and n % 16 == 10]
    bursts = [stamps["wall"]("audio", at) for at in onsets(one.frames["audio"])]
    assert len(flashes) > 1 and len(bursts) > 1
    gaps = [min((burst - flash for burst in bursts), key=abs) for flash in flashes]
    assert abs(np.median(gaps)) < 0.1, gaps


def reports(monkeypatch):
    """Record the sender reports that the caller gets, and the RTP time of its first packets."""
    out = {"reports": {"video": [], "audio": []}, "first": {}}
    rtcp, rtp = RTCRtpReceiver._handle_rtcp_packet, RTCRtpReceiver._handle_rtp_packet

    async def on_rtcp(self, packet):
        if hasattr(packet, "sender_info"):
            info = packet.sender_info
            out["reports"][self._RTCRtpReceiver__kind].append((packet.ssrc, info.ntp_timestamp / 2 ** 32, info.rtp_timestamp))
        await rtcp(self, packet)

    async def on_rtp(self, packet, arrival_time_ms):
        out["first"].setdefault(packet.ssrc, packet.timestamp)
        await rtp(self, packet, arrival_time_ms)

    def wall(kind, pts):
        """Seconds of the sender's clock at a time stamp of the decoded stream."""
        rate, found = {"video": 90_000, "audio": 48_000}[kind], out["reports"][kind]
        return float(np.median([ntp + ((out["first"][ssrc] + pts - at + 2 ** 31) % 2 ** 32 - 2 ** 31) / rate for ssrc, ntp, at in found]))
    monkeypatch.setattr(RTCRtpReceiver, "_handle_rtcp_packet", on_rtcp)
    monkeypatch.setattr(RTCRtpReceiver, "_handle_rtp_packet", on_rtp)
    return out | {"wall": wall}


def onsets(frames):
    """pts, in samples, at which bursts begin."""
    loud = [np.abs(f.to_ndarray().reshape(-1, 2)[:, 0]) > 0.3 * 32767 for f in frames]
    at = [f.pts + int(hit.argmax()) for f, hit in zip(frames, loud) if hit.any()]
    return [b for a, b in zip([-10 ** 6, *at], at) if b - a > 0.5 * 48000]


def test_the_line_is_held_by_one_and_freed():
    async def main():
        made = []
        async with served(lambda: made.append(Fake()) or made[-1]) as caller:
            one, two, three = caller(), caller(), caller()
            assert (await one.offer())[0] == 200
            status, answer = await two.offer()
            assert status == 409 and "on the line" in answer["error"] and len(made) == 1
            await until(lambda: made[0].n > 2, "the first call's frames")
            await one.pc.close()
            await until(lambda: made[0].state == "closed", "the end of the first call")
            assert (await three.offer())[0] == 200
            await until(lambda: made[1].n > 2, "the second call's frames")
            assert made[0].state == "closed" and made[1].state == "started"
    asyncio.run(main())


@pytest.mark.parametrize("error, words", [(UserError("out of memory; close other programs"), "^out of memory; close other programs$"),
                                          (KeyError("weight"), "^The server failed .KeyError: 'weight'.; its terminal")])
def test_a_conversation_that_fails_says_why_and_frees_the_line(error, words, capsys):
    async def main():
        made = [Fake(fails_at=3, error=error), Fake()]
        fakes = iter(made)
        async with served(lambda: next(fakes)) as caller:
            one, two = caller(polite=isinstance(error, UserError)), caller()
            assert (await one.offer())[0] == 200
            await until(lambda: one.told and one.told[-1]["kind"] == "ended", "the reason")
            assert re.search(words, one.told[-1]["text"])
            await until(lambda: made[0].state == "closed", "its end")
            assert (await two.offer())[0] == 200
            await until(lambda: made[1].n, "the next call")
    asyncio.run(main())
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(error, UserError))


def test_models_that_fail_at_once_are_told_and_free_the_line():
    async def main():
        def new():
            if not tries:
                tries.append(1)
                raise UserError("no memory for another conversation")
            return Fake()
        tries = []
        async with served(new) as caller:
            one, two = caller(), caller()
            assert await one.offer() == (500, {"error": "no memory for another conversation"})
            assert (await two.offer())[0] == 200
    asyncio.run(main())


def test_a_slow_start_holds_up_nobody_and_is_waited_for():
    """Who leaves while the face is made frees the line; the conversation is closed after its start, not during it."""
    async def main():
        class Slow(Fake):
            def start(self):
                begun.set()
                go.wait(PATIENCE)
                super().start()

            def close(self):
                assert self.state == "started"
                super().close()
        begun, go, made = threading.Event(), threading.Event(), []
        async with served(lambda: made.append(Slow()) or made[-1]) as caller:
            one, two = caller(), caller()
            leaving = asyncio.ensure_future(one.offer())
            await until(begun.is_set, "the start")
            assert (await two.offer())[0] == 409                     # the loop answers meanwhile
            leaving.cancel()
            await asyncio.sleep(0.2)
            go.set()
            await until(lambda: made[0].state == "closed", "the end of the first")
            assert (await caller().offer())[0] == 200
    asyncio.run(main())


def test_losing_the_microphone_hangs_up():
    async def main():
        fake = Fake()
        async with served(lambda: fake) as caller:
            one = caller()
            await one.offer()
            await until(lambda: fake.heard, "sound")
            await next(t for t in one.pc.getTransceivers() if t.kind == "audio").sender.stop()     # says good-bye (RTCP BYE)
            await until(lambda: fake.state == "closed", "the end")
            assert one.told[-1] == {"kind": "ended", "text": "The sound of your microphone has ended."}
    asyncio.run(main())


def test_stopping_the_server_ends_the_call():
    async def main():
        fake = Fake()
        async with served(lambda: fake) as caller:
            one = caller()
            await one.offer()
            await until(lambda: fake.n > 2, "frames")
            await one.http.close()
            assert fake.state == "closed" and one.told[-1] == {"kind": "ended", "text": "The server was stopped."}
    asyncio.run(main())


def test_a_caller_who_never_connects_loses_the_line(monkeypatch):
    monkeypatch.setattr(call, "CONNECT_S", 0.3)

    async def main():
        fake, made = Fake(), []
        async with served(lambda: made.append(Fake() if made else fake) or made[-1]) as caller:
            one = caller()
            one.pc.setRemoteDescription = lambda answer: asyncio.sleep(0)        # has got the answer, and does nothing with it
            assert (await one.offer())[0] == 200
            await until(lambda: fake.state == "closed", "the end of patience")
            assert fake.n == 0 and (await caller().offer())[0] == 200
    asyncio.run(main())


@pytest.mark.parametrize("body", [dict(sdp="hello"), dict(sdp=7), dict(type="answer"), dict(type="no"), dict(more=1), "no video", "no sound"])
def test_what_is_no_offer_is_refused_and_holds_no_line(body):
    async def main():
        async with served(Fake) as caller:
            one = caller()
            if body == "no video":
                one.pc.addTransceiver = lambda *_, **__: None
            if body == "no sound":
                one.pc.addTrack = lambda track: None
            status, answer = await one.offer(**body if isinstance(body, dict) else {})
            assert status == 400 and answer["error"].startswith("not the offer of a call")
            for data, headers in (("{", {"Content-Type": "application/json"}), ("[]", {"Content-Type": "application/json"}), ("{}", {})):
                assert (await one.http.post("/offer", data=data, headers=headers)).status == 400
            assert (await caller().offer())[0] == 200
    asyncio.run(main())


# ------------------------------------------------------------------------------------------------------- the pieces
def test_both_tracks_hold_the_same_moment_at_the_same_time():
    """Before any network: frame n and the first sample of its sound have one time stamp, and are handed out together."""
    async def main():
        one = call.Call([], lambda: None)
        one.conversation, one.microphone, got = Fake(), Tone(), {"video": [], "audio": []}
        one.conversation.start()

        async def take(track):
            while True:
                frame = await track.recv()
                got[track.kind].append((time.monotonic(), frame))
        tasks = [asyncio.ensure_future(job) for job in (one.pace(), one.listen(), take(one.video), take(one.audio))]
        await until(lambda: one.conversation.n >= 32, "two seconds")
        for task in tasks:
            task.cancel()
        await one.hang_up()
        return one.conversation, one.began, got

    fake, began, got = asyncio.run(main())
    frames, packets = ([frame for _, frame in got[kind]] for kind in ("video", "audio"))
    assert [round(f.time * 16) for f in frames] == list(range(len(frames))) and len(frames) >= 28
    assert [number(f)[0] for f in frames] == list(range(len(frames)))
    assert [p.pts for p in packets] == list(range(0, 960 * len(packets), 960)) and {p.samples for p in packets} == {960}
    wave = np.concatenate([p.to_ndarray()[0, ::2] for p in packets])
    starts = np.flatnonzero(np.abs(wave) > 3000)
    starts = starts[np.diff(starts, prepend=-10 ** 6) > 20_000]
    assert np.abs(starts / 48_000 - [10 / 16, 26 / 16][:len(starts)]).max() < 0.002 and len(starts)
    late = [at - began - f.time for kind in got for at, f in got[kind]]
    assert min(late) > call.LAG - 0.001
    assert len(fake.heard) > 10


def test_a_loop_that_was_held_up_catches_up_a_little_and_drops_no_frame():
    async def main():
        one = call.Call([], lambda: None)
        one.conversation, shown = Fake(), []
        one.conversation.start()
        one.video.put = lambda frame: shown.append((time.monotonic(), frame.pts))
        task = asyncio.ensure_future(one.pace())
        await until(lambda: one.conversation.n >= 3, "a start")
        time.sleep(1.5)                                              # something holds the loop
        held = time.monotonic()
        await until(lambda: one.conversation.n >= 20, "the rest")
        task.cancel()
        await one.hang_up()
        return held, shown
    held, shown = asyncio.run(main())
    assert [pts for _, pts in shown] == [5625 * n for n in range(len(shown))]
    after = [at - held for at, _ in shown if at > held]
    assert len(after) > 8 and after[-1] > (len(after) - 2 - call.BEHIND) / 16    # 4 at once, then again 16 a second


def test_a_track_that_nobody_empties_keeps_the_newest():
    async def main():
        track = call.Track("video", lambda seconds: 0.0, 8)
        for n in range(100):
            track.put(call.enlarged(np.zeros((64, 64, 3), np.uint8), n))
        return [(await track.recv()).pts // 5625 for _ in range(8)], track.waiting.qsize()
    assert asyncio.run(main()) == ([*range(92, 100)], 0)


@pytest.mark.parametrize("size, side", [(64, 384), (96, 384), (128, 384), (480, 480)])
def test_small_frames_are_enlarged_smoothly(size, side):
    picture = np.random.default_rng(0).integers(0, 256, (size // 2, size // 2, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    frame = call.enlarged(picture, 3)
    assert (frame.width, frame.height, frame.pts, frame.time_base) == (side, side, 3 * 5625, Fraction(1, 90_000))
    want = Image.fromarray(picture).convert("L").resize((side, side), Image.LANCZOS)
    shown = (frame.to_ndarray(format="yuv420p")[:side].astype(float) - 16) * 255 / 219         # studio range
    assert np.abs(shown - np.asarray(want)).mean() < 3


SIZES = np.random.default_rng(1).integers(1, 3000, 60)


@pytest.mark.parametrize("sizes", [[1000], [1], [7, 1000, 333], [50_000], SIZES], ids=["frames", "single samples", "odd", "whole", "any"])
def test_sound_to_48k_has_no_seams(sizes):
    total = 4000 if list(sizes) == [1] else 50_000
    wave = (0.5 * np.sin(2 * np.pi * 700 * np.arange(total) / 16_000)).astype(np.float32)
    packets, at, out, turn = call.Packets(), 0, [], 0
    while at < total:
        n = int(sizes[turn % len(sizes)])
        out += packets(wave[at:at + n])
        at, turn = at + n, turn + 1
    assert {p.samples for p in out} == {960} and [p.pts for p in out] == [960 * k for k in range(len(out))]
    left, right = (np.concatenate([p.to_ndarray()[0, side::2] for p in out]) for side in (0, 1))
    joined = left / 32768
    assert np.array_equal(left, right)
    assert total * 3 - 2 * 960 < len(joined) <= total * 3
    ideal = 0.5 * np.sin(2 * np.pi * 700 * np.arange(len(joined)) / 48_000)
    assert np.abs(joined - ideal)[300:].max() < 2e-4                 # in time, in level, at every seam
    whole = np.concatenate([p.to_ndarray()[0, ::2] for p in call.Packets()(wave)]) / 32768
    assert np.array_equal(joined, whole[:len(joined)])


def decoded(wave, at, channels, rate=48_000):
    frame = av.AudioFrame.from_ndarray((32767 * wave).astype(np.int16).repeat(channels)[None], "s16", "stereo" if channels == 2 else "mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
    return frame


@pytest.mark.parametrize("channels, rate", [(2, 48_000), (1, 48_000), (1, 8_000)])
def test_ears_hear_16k_at_the_level_it_was_sent(channels, rate):
    wave, step = 0.4 * np.sin(2 * np.pi * 500 * np.arange(2 * rate) / rate), rate // 50
    ears = call.Ears()
    heard = np.concatenate([ears(decoded(wave[at:at + step], 7 * rate + at, channels, rate)) for at in range(0, len(wave), step)])
    ideal = 0.4 * np.sin(2 * np.pi * 500 * np.arange(len(heard)) / 16_000)
    assert heard.dtype == np.float32 and 31_900 < len(heard) <= 32_000 and np.abs(heard - ideal)[200:].max() < 2e-3


def test_ears_keep_time_over_lost_packets():
    ears, lost = call.Ears(), {10, 11, 12, 40}
    wave = np.full(960, 0.5)
    heard = np.concatenate([ears(decoded(wave, 960 * k, 2)) for k in range(100) if k not in lost])
    assert abs(len(heard) - 32_000) < 40
    silent = np.abs(heard) < 1e-6
    assert silent.sum() == 4 * 320 and silent[3300:4000].all() and silent[12_900:13_000].all()


# -------------------------------------------------------------------------------------------------------- the page
def test_the_page_needs_no_other_address(tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "face.png")

    async def main():
        client = TestClient(TestServer(call.application(Fake, tmp_path / "face.png", ["stun:</script>:3478"])))
        await client.start_server()
        text, face = await (await client.get("/")).text(), await client.get("/face")
        assert face.content_type == "image/png" and await face.read() == (tmp_path / "face.png").read_bytes()
        await client.close()
        return text
    text = asyncio.run(main())
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text) and "@ICE@" not in text
    assert json.loads(re.search(r'id="ice">(.*?)</script>', text)[1]) == ["stun:</script>:3478"]
    for needed in ('role="status"', "echoCancellation: true", "noiseSuppression: true", "playsinline", "prefers-color-scheme: dark",
                   "width=device-width"):
        assert needed in text
    kinds = {"ended", "state", "began", "heard", "nothing", "answer", "spoke", "interrupted"}
    assert set(re.findall(r'kind === "(\w+)"', text)) == kinds       # each that the server sends is shown, and no other


# ----------------------------------------------------------------------------------------------------- the command
@pytest.fixture
def files(tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "face.png")
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "models").mkdir()
    return tmp_path


def command(folder, *options, face="face.png", models="models"):
    return [str(folder / face), "--models", str(folder / models), *options]


@pytest.mark.parametrize("changed, words", [(dict(face="other.png"), "other.png: no such file"), (dict(face="notes.png"), "notes.png: not a picture"),
                                            (dict(models="none"), "none: no such folder of models; check the name")])
def test_mistakes_are_found_before_the_models_load(files, changed, words):
    with pytest.raises(UserError, match=words):
        call.main(command(files, **changed), lambda args: pytest.fail("the models were loaded"))


def test_options_that_make_no_sense_are_told(files, capsys):
    for option, value in (("--stun", "stun:a.example:1"), ("--stun", "a.example:")):
        with pytest.raises(UserError, match=f"^{option} {value}: give "):
            call.main(command(files, option, value), lambda args: pytest.fail("the models were loaded"))
    for option, value in (("--seed", "x"), ("--seed", "-1"), ("--seed", str(2**64)), ("--placement", "cloud")):
        with pytest.raises(SystemExit) as stop:
            call.main(command(files, option, value))
        assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("host, port", [("127.0.0.1", None), ("127.0.0.1", 70_000), ("192.0.2.77", 0), ("a..b", 0)])
def test_an_address_that_cannot_be_had_is_told_before_the_models_load(files, host, port):
    with call.bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1] if port is None else port
        with pytest.raises(UserError, match=rf"{host}, port {port}: cannot serve there .*--port.*--host"):
            call.main(command(files, "--port", str(port), "--host", host), lambda args: pytest.fail("the models were loaded"))


def test_help_says_where_a_microphone_is_to_be_had():
    said = " ".join(call.arguments().format_help().split())
    assert "https or localhost" in said and "ssh -L 8016:localhost:8016 MACHINE" in said and said.endswith("are one machine.")


PROGRAM = """
import signal, sys
import aioice.ice
from test_call import Fake
from tmlib import call, config
signal.signal(signal.SIGINT, signal.default_int_handler)         # ignored, where the tests themselves run in the background
aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
class Told(Fake):
    def close(self):
        print("closed", flush=True)
def load(args):
    print(args.seed, args.style_prompt, args.models, args.face, flush=True)
    return Told
config.cli(lambda: call.main(sys.argv[1:], load))
"""


@pytest.mark.parametrize("sent, code, said", [(signal.SIGINT, 130, "stopped\n"), (signal.SIGTERM, 143, "")])
def test_the_command_says_its_address_and_ends_cleanly_in_a_call(files, sent, code, said):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *command(files, "--port", "0", "--seed", "7", "--style-prompt", "flat")], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=config.ROOT,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (config.ROOT, TESTS)))})
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[:2] == [f"models: {files / 'models'}\n", f"7 flat {files / 'models'} {files / 'face.png'}\n"]
    address = re.fullmatch(r"open (http://localhost:\d+)/ in a browser and press Call; Ctrl-C ends\n", lines[2])[1]

    async def main():
        async with aiohttp.ClientSession(address) as http:
            one = Caller(http)
            assert (await one.offer())[0] == 200
            await until(lambda: one.frames["video"] and one.told, "the call")
            process.send_signal(sent)
            await until(lambda: process.poll() is not None, "the end")
            await one.pc.close()
            return one.told[-1]
    assert asyncio.run(main()) == {"kind": "ended", "text": "The server was stopped."}
    assert (process.returncode, process.stdout.read(), process.stderr.read()) == (code, "closed\n", said)


def test_bad_input_ends_with_2_and_one_line(files):
    run = subprocess.run([sys.executable, "-m", "tmlib.call", *command(files, face="other.png")], capture_output=True, text=True, cwd=config.ROOT,
                         timeout=PATIENCE)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ") and "other.png" in run.stderr


def test_what_the_command_loads_is_what_calls_get(files, monkeypatch):
    """`load` is called once; the application gets what it returned, the face and the STUN servers."""
    asked = []

    async def serve(app, listening):
        asked.append((app, listening.getsockname()[0]))
    monkeypatch.setattr(call, "serve", serve)
    monkeypatch.setattr(call, "application", lambda *given: given)
    new = lambda: None
    assert call.main(command(files, "--port", "0", "--stun", "a.example:3478", "--stun", "b.example:3478"), lambda args: new) == 143
    assert asked == [((new, str(files / "face.png"), ["stun:a.example:3478", "stun:b.example:3478"]), "127.0.0.1")]
