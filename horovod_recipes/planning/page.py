"""Shows a plan as a page of text, and writes it to files."""

import json
import textwrap

import matplotlib.figure
import numpy as np

from horovod_recipes.planning.estimate import FEWEST_BATCH_NORM_IMAGES
from keras_lars._files import written_atomically


def as_text(plan, name):
    """Returns a plan as a page for people to read.

    Args:
        plan: The result of `make_plan`.
        name: String, the name of the config.
    """
    job, hardware = plan["job"], plan["hardware"]
    speed = (
        f"{hardware['description']}; {hardware['achieved_fraction']:.0%} of "
        f"{hardware['peak_flops'] / 1e12:.4g} TFLOP/s, from "
        f"{hardware['speed_source']}"
    )
    rates = plan["schedule"]["learning_rates"]
    return "\n".join(
        [
            f"{name} on {job['ranks']} ranks of {hardware['name']} in "
            f"{hardware['precision']}",
            *(f"  {line}" for line in textwrap.wrap(speed, 76)),
            "",
            f"global batch   {job['global_batch_size']} = {job['ranks']} ranks "
            f"x {job['micro_batch_size']} micro-batch x "
            f"{job['accumulation_steps']} accumulation",
            f"steps          {job['steps']} = {job['epochs']} epochs x "
            f"{job['steps_per_epoch']}",
            f"learning rate  {bars(rates)}",
            f"               highest {plan['schedule']['highest']:.4g}, last "
            f"{rates[-1]:.3g}",
            "",
            *memory_lines(plan["memory"], hardware["memory"]),
            "",
            *step_lines(plan),
            "",
            *scaling_lines(plan["scaling"]),
        ]
    )


def memory_lines(memory, available):
    total = sum(memory.values())
    return [
        "memory per device, GB",
        *(f"  {size / 1e9:8.3f}  {part}" for part, size in memory.items()),
        f"  {total / 1e9:8.3f}  of {available / 1e9:g}, without temporaries"
        + (": DOES NOT FIT" if total > available else ""),
    ]


def step_lines(plan):
    job, step = plan["job"], plan["step"]
    images = job["micro_batch_size"] * job["accumulation_steps"]
    speed = job["global_batch_size"] / step["total"]
    return [
        "time per step, ms",
        f"  {1e3 * step['forward_and_backward']:8.2f}  forward and backward "
        f"passes of {images} images, "
        f"{plan['training_flops_per_image'] / 1e9:.1f} GFLOP per image",
        f"  {1e3 * step['exposed_allreduce']:8.2f}  exposed allreduce of "
        f"{plan['allreduce_bytes'] / 1e6:.1f} MB; "
        f"{1e3 * step['hidden_allreduce']:.2f} ms more are hidden by the "
        "backward pass",
        f"  {1e3 * step['update']:8.2f}  update",
        f"  {1e3 * step['total']:8.2f}  total: {speed:,.0f} images/s, "
        f"{speed / job['ranks']:,.0f} per rank; training takes "
        f"{duration(job['steps'] * step['total'])}",
    ]


def scaling_lines(rows):
    lines = [
        "ranks  micro-batch  accum.    exposed ms   step ms    images/s  "
        "efficiency  to train"
    ]
    for row in rows:
        if "step" not in row:
            lines.append(f"{row['ranks']:5}  {row['note']}")
            continue
        lines.append(
            f"{row['ranks']:5}  {row['micro_batch_size']:11}"
            f"{'*' if row['note'] else ' '} "
            f"{row['accumulation_steps']:6}  "
            f"{1e3 * row['step']['exposed_allreduce']:12.2f}  "
            f"{1e3 * row['step']['total']:8.1f}  "
            f"{row['images_per_second']:10,.0f}  {row['efficiency']:10.1%}  "
            f"{duration(row['training_seconds'])}"
        )
    if any("*" in line for line in lines):
        lines.append(
            f"* below {FEWEST_BATCH_NORM_IMAGES} images, batch norm is less "
            "accurate and the device is slower than planned"
        )
    return lines


def bars(values, width=60):
    """Returns a line of bars that shows non-negative values."""
    indices = np.linspace(0, len(values) - 1, width).round().astype(int)
    heights = np.array(values)[indices] / (max(values) or 1)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * height)] for height in heights)


def duration(seconds):
    """Formats a time as hours and minutes, or as minutes and seconds."""
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(seconds) // 60} min {round(seconds) % 60:02} s"


def write_plan(plan, folder):
    """Writes plan.json, and a plot of the schedule to schedule.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder / "plan.json") as part:
        part.write_text(json.dumps(plan, indent=1) + "\n")
    figure = matplotlib.figure.Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(plan["schedule"]["steps"], plan["schedule"]["learning_rates"])
    axes.set_xlabel("step (update)")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    with written_atomically(folder / "schedule.png") as part:
        figure.savefig(part, dpi=120)
