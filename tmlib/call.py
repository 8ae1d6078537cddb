"""A live call with the avatar, in the browser: `python -m tmlib.call face.png`, then open the address that it prints.

Special here:
- browsers give a microphone to pages of https or localhost alone. From another machine: `ssh -L 8016:localhost:8016 MACHINE`, then open
  http://localhost:8016/; or put an https proxy before the server. Sound and picture go past both, by UDP, which must get through: --stun where
  one side has a private address. Where no UDP gets through, a relay (TURN) would be needed, which is not offered. WebRTC leaves the loopback
  interface out: a network must be up even where browser and server are one machine;
- one pace-maker takes a frame and its sound from the conversation every 1/16 s and stamps both. Both tracks hand out what they hold by one
  clock, LAG after its time, so that the reports from which a browser aligns lips and sound (RTCP) agree too;
- one caller at a time. However a call ends, its conversation is closed, and the line is free for the next.
"""
import argparse
import asyncio
import errno
import json
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from aiohttp import web
from aiortc import MediaStreamTrack, RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from . import config, media
from .config import FPS, UserError
from .talk import PLACEMENTS, SPEEDS, models_folder, whole

RATE, PACKET, CLOCK = 48_000, 960, 90_000       # Opus: samples per second and per packet (20 ms); ticks per second of a video timestamp
LAG = 0.04                                      # s: a packet that straddles two frames is complete 20 ms late, and loops are not punctual
BEHIND = 4                                      # frames: what is further behind than this is not caught up
WAITING_S = 0.5                                 # of frames or packets that may wait for a slow encoder; then the oldest is dropped
CONNECT_S = 20                                  # for finding a way through the network
AUDIBLE, PAUSE = 0.01, 12                       # the avatar speaks while its sound is above, and until it was not for so many frames


class Packets:
    """The avatar's sound, float32 (n,) mono at 16 kHz in pieces of any size, -> list[av.AudioFrame] of PACKET samples, without a seam.

    Stereo, because that is what aiortc encodes, and it makes mono sound 3 dB quieter on the way.
    """

    def __init__(self):
        self.resampler, self.given = av.AudioResampler("s16", "stereo", RATE, PACKET), 0

    def __call__(self, wave: np.ndarray) -> list[av.AudioFrame]:
        sound = av.AudioFrame.from_ndarray(wave.astype(np.float32).repeat(2)[None], "flt", "stereo")
        sound.sample_rate = media.RATE
        packets = self.resampler.resample(sound)
        for packet in packets:
            packet.pts, packet.time_base, self.given = self.given, Fraction(1, RATE), self.given + PACKET
        return packets


class Ears:
    """Decoded frames of the caller's sound, of any rate and channels, -> float32 (n,) mono at 16 kHz; silence for what the network lost."""

    def __init__(self):
        self.resampler, self.due = av.AudioResampler("fltp", rate=media.RATE), None

    def __call__(self, frame: av.AudioFrame) -> np.ndarray:
        lost_s = 0.0 if self.due is None else frame.time - self.due
        self.due = frame.time + frame.samples / frame.sample_rate
        frame.pts = None                                     # the resampler counts for itself
        pieces = [part.to_ndarray().mean(0).clip(-1, 1) for part in self.resampler.resample(frame)]     # (channels, n) -> (n,); coding overshoots
        return np.concatenate([np.zeros(round(lost_s * media.RATE) if 0 < lost_s < 5 else 0, np.float32), *pieces])


class Track(MediaStreamTrack):
    """Frames put in order are handed out at `due(seconds of their timestamp)` of time.monotonic; at most `most` wait."""

    def __init__(self, kind: str, due: Callable[[float], float], most: int):
        super().__init__()
        self.kind, self.due, self.most, self.waiting = kind, due, most, asyncio.Queue()

    def put(self, frame: av.VideoFrame | av.AudioFrame) -> None:
        if self.waiting.qsize() >= self.most:
            self.waiting.get_nowait()
        self.waiting.put_nowait(frame)

    async def recv(self) -> av.VideoFrame | av.AudioFrame:
        frame = await self.waiting.get()
        await asyncio.sleep(self.due(frame.time) - time.monotonic())
        return frame


def enlarged(picture: np.ndarray, n: int) -> av.VideoFrame:
    """Picture uint8 (H, W, 3), the n-th -> frame of about WATCHABLE pixels. Lanczos: the hard edges of repeated pixels turn to noise in VP8."""
    scale = max(1, media.WATCHABLE // len(picture))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    frame = frame.reformat(picture.shape[1] * scale, len(picture) * scale, "yuv420p", interpolation="LANCZOS")
    frame.pts, frame.time_base = n * CLOCK // FPS, Fraction(1, CLOCK)
    return frame


class Call:
    """One caller and one conversation, from the offer to the end; lives in the event loop that made it. ended(): called last."""

    def __init__(self, ice: list[str], ended: Callable[[], None]):
        self.pc, self.ended = RTCPeerConnection(RTCConfiguration([RTCIceServer(url) for url in ice])), ended
        self.conversation = self.microphone = self.channel = self.making = self.ending = self.told_state = None
        self.began, self.told, self.quiet, self.tasks, self.gone = 0.0, 0, PAUSE, [], asyncio.Event()
        due = lambda seconds: self.began + seconds + LAG
        self.video, self.audio = Track("video", due, int(WAITING_S * FPS)), Track("audio", due, int(WAITING_S * RATE / PACKET))
        self.pc.on("track", lambda track: setattr(self, "microphone", track))
        self.pc.on("datachannel", lambda channel: setattr(self, "channel", channel))
        self.pc.on("connectionstatechange", self.changed)

    def changed(self) -> None:
        if self.pc.connectionState == "connected" and not self.ending:
            self.tasks += [asyncio.ensure_future(self.pace()), asyncio.ensure_future(self.listen())]
        elif self.pc.connectionState in ("failed", "closed"):
            self.gone.set()
            self.hang_up()

    async def take(self, offer: RTCSessionDescription) -> None:
        """Raises UserError for what is not the offer of a call."""
        try:
            await self.pc.setRemoteDescription(offer)
        except Exception as error:                           # whatever aiortc meets in a text that is none
            raise UserError(f"not the offer of a call: {type(error).__name__}: {error}") from error
        if sorted(t.kind for t in self.pc.getTransceivers()) != ["audio", "video"] or not self.microphone or self.microphone.kind != "audio":
            raise UserError("not the offer of a call: it must send sound, and receive sound and video")

    async def answer(self, new: Callable[[], "Conversation"]) -> dict[str, str]:
        """Makes and starts the conversation, so that the face lives when the connection stands. Raises what these raise."""
        self.making = asyncio.ensure_future(asyncio.to_thread(self._make, new))
        await asyncio.shield(self.making)
        self.pc.addTrack(self.video)
        self.pc.addTrack(self.audio)
        await self.pc.setLocalDescription(await self.pc.createAnswer())
        asyncio.get_running_loop().call_later(CONNECT_S, lambda: self.pc.connectionState == "connected" or self.hang_up())
        return {"type": self.pc.localDescription.type, "sdp": self.pc.localDescription.sdp}

    def _make(self, new: Callable[[], "Conversation"]) -> None:
        self.conversation = new()
        self.conversation.start()

    async def pace(self) -> None:
        """The pace-maker: takes the conversation's frames until it fails or the call ends."""
        try:
            packets, n, self.began = Packets(), 0, time.monotonic()
            while True:
                picture, sound = self.conversation.frame()
                self.video.put(enlarged(picture, n))
                for packet in packets(sound):
                    self.audio.put(packet)
                self.quiet = 0 if np.abs(sound).max(initial=0) > AUDIBLE else self.quiet + 1
                self.tell()
                n += 1
                late = time.monotonic() - self.began - n / FPS
                self.began += max(0.0, late - BEHIND / FPS)
                await asyncio.sleep(-late)
        except Exception as error:
            self.hang_up(why(error))

    async def listen(self) -> None:
        ears = Ears()
        try:
            while True:
                if len(wave := ears(await self.microphone.recv())):
                    await asyncio.to_thread(self.conversation.hear, wave)    # which may think about it for longer than a loop should wait
        except MediaStreamError:
            self.hang_up("The sound of your microphone has ended.")
        except Exception as error:
            self.hang_up(why(error))

    def tell(self, reason: str = "") -> None:
        """What is new, to the page: the conversation's events, whether the avatar speaks (its sound shows it), and why the call ends."""
        if not self.channel or self.channel.readyState != "open":
            return                                           # not yet: it is told later
        events, state = self.conversation.events[self.told:], "speaking" if self.quiet < PAUSE else "listening"
        news = [{"kind": e.kind, "at": round(e.at, 3), "text": e.text} for e in events]
        news += [{"kind": "state", "text": state}] * (state != self.told_state) + [{"kind": "ended", "text": reason}] * bool(reason)
        for item in news:
            self.channel.send(json.dumps(item))
        self.told, self.told_state = self.told + len(events), state

    def hang_up(self, reason: str = "") -> asyncio.Future:
        """Ends the call, once; the page shows the reason. Done when all is closed."""
        self.ending = self.ending or asyncio.ensure_future(self._end(reason))
        return self.ending

    async def _end(self, reason: str) -> None:
        async with AsyncExitStack() as last:                 # each of these, whatever happens to the others
            last.callback(self.ended)
            last.push_async_callback(self._close)
            last.push_async_callback(lambda: asyncio.wait([asyncio.ensure_future(self.pc.close())], timeout=5))     # a broken one may never be done
            for task in self.tasks:
                task.cancel()
            if reason and self.pc.connectionState == "connected":
                with suppress(TimeoutError):
                    async with asyncio.timeout(2):
                        while not self.channel:              # it opens a moment after the connection
                            await asyncio.sleep(0.05)
                        self.tell(reason)
                        await self.gone.wait()               # the page hangs up when it has read that

    async def _close(self) -> None:
        if self.making:
            await asyncio.wait([self.making])
        if self.conversation:
            await asyncio.to_thread(self.conversation.close)


def why(error: Exception) -> str:
    """For the page. A mistake of the program's own goes to the terminal too."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return f"The server failed ({type(error).__name__}: {error}); its terminal says where."


def application(new: Callable[[], "Conversation"], face, ice: list[str]) -> web.Application:
    """The page, its picture of before the call, and the one line that callers share. new: makes the conversation of a call. ice: STUN servers."""
    line: list[Call] = []                                    # the call, if there is one

    async def offer(request: web.Request) -> web.Response:
        """{type, sdp} -> {type, sdp}; else {error}, with status 400 for no such thing, 409 while another calls, 500 when the models fail."""
        told = lambda status, text: web.json_response({"error": text}, status=status)
        try:
            if request.content_type != "application/json":   # which pages of other sites cannot send unasked
                raise ValueError("expected application/json")
            wanted = RTCSessionDescription(**await request.json())
        except (ValueError, TypeError) as error:
            return told(400, f"not the offer of a call: {error}")
        while line and line[0].ending:
            await asyncio.wait([line[0].ending])
        if line:
            return told(409, "Somebody else is on the line. Call again when they have hung up.")
        line.append(call := Call(ice, line.clear))
        status = 400
        try:
            await call.take(wanted)
            status = 500
            return web.json_response(await call.answer(new))
        except asyncio.CancelledError:                       # the caller has left meanwhile
            call.hang_up()
            raise
        except Exception as error:
            await call.hang_up()
            return told(status, why(error))

    async def close(_) -> None:
        for call in line:
            await call.hang_up("The server was stopped.")

    async def page(_) -> web.Response:
        template = Path(__file__).with_name("call_template.html").read_text(encoding="utf-8")
        return web.Response(text=template.replace("@ICE@", json.dumps(ice).replace("<", "\\u003c")), content_type="text/html")

    async def picture(_) -> web.FileResponse:
        return web.FileResponse(face)

    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/face", picture), web.post("/offer", offer)])
    app.on_shutdown.append(close)
    return app


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises UserError when there is none to be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        what = os.strerror(error.errno) if getattr(error, "errno", None) in errno.errorcode else error     # its own text says the address again
        raise UserError(f"{host}, port {port}: cannot serve there ({what}); another program, perhaps another call, may hold the port: "
                        "give another one with --port, or another address of this machine with --host") from None


async def serve(app: web.Application, listening: socket.socket) -> None:
    """Until SIGTERM, or until it is cancelled; then the call is ended."""
    runner, stop = web.AppRunner(app, access_log=None, handler_cancellation=True), asyncio.Event()
    await runner.setup()
    try:
        with suppress(NotImplementedError):                  # on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)     # an exception would tear the loop down
        await web.SockSite(runner, listening).start()
        host, port = listening.getsockname()[:2]
        host = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1", "::1") else f"[{host}]" if ":" in host else host
        print(f"open http://{host}:{port}/ in a browser and press Call; Ctrl-C ends", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _load(args) -> Callable[[], "Conversation"]:
    """The models, loaded once -> what makes the conversation of one call."""
    from .conversation import open_call
    return open_call(args.face, args.models, args.seed, args.style_prompt, args.partner, args.voice, args.fast, args.placement)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tmlib.call", description="A live call with a face, in the browser.",
                                     epilog=f"Note: {__doc__.split(chr(10) + '- ')[1].rstrip(';')}.")
    add = parser.add_argument
    add("face", help="a picture of one face, any usual format; the centre square is used")
    add("--models", metavar="FOLDER", help="trained models (default: data/models after `make repro`, else data/demo)")
    add("--port", type=int, default=8016, metavar="N", help="of the page; 0: any free one (default 8016)")
    add("--host", default="127.0.0.1", help="of the page; 0.0.0.0: reached from everywhere (default 127.0.0.1, from this machine alone)")
    add("--stun", action="append", default=[], metavar="HOST:PORT", help="who tells both sides their public address (default: nobody)")
    add("--partner", metavar="NAME", help="folder or hub id of a public audio language model, such as Qwen/Qwen2-Audio-7B-Instruct (default: the models' own)")
    add("--voice", metavar="NAME", help="who speaks, of data/voices.yaml")
    add("--placement", choices=PLACEMENTS, default="serial", help="where picture and decoder run, see tmlib/placement.py; two_device: with two GPUs, the decoder on the other (default serial)")
    add("--fast", choices=SPEEDS, help="on a GPU: faster forms of the models, see `python -m tmlib.talk --help`; compiling them comes before the first call")
    add("--seed", type=whole(0, 2**63), default=0, metavar="N", help="another seed gives another sway of the head (default 0)")
    add("--style-prompt", default="", metavar="WORDS", help="the picture's style: flat, line or soft3d (default: unsaid)")
    return parser


def main(argv: list[str] | None = None, load: Callable[..., Callable[[], "Conversation"]] = _load) -> int:
    """The command. `load` makes what makes conversations; tests give their own."""
    args = arguments().parse_args(argv)
    media.read_image(args.face, 64)                          # a bad picture, or a port that is taken, should not wait for the models
    args.models = models_folder(args.models)
    if wrong := [server for server in args.stun if not re.fullmatch(r"[\w.-]+(:\d{1,5})?", server)]:
        raise UserError(f"--stun {wrong[0]}: give the name of a STUN server and, after a colon, its port")
    with bound(args.host, args.port) as listening:
        print(f"models: {args.models}", flush=True)
        asyncio.run(serve(application(load(args), args.face, [f"stun:{server}" for server in args.stun]), listening))
    return 143                                               # SIGTERM, as in config.cli


if __name__ == "__main__":
    config.cli(main)
