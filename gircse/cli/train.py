"""`gircse train`: run a recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gircse.cli.common import DebugOption, JsonOption, stderr
from gircse.errors import UsageError

if TYPE_CHECKING:
    from gircse.train.plan import DryRun, TrainingPlan
    from gircse.train.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the trained model and its checkpoints.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the training files, instead of the recipe's.")] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Folder of the tasks scored during training, instead of the recipe's.")
    ] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="K, instead of the recipe's; 0: the encoder-only twin, without what is about soft tokens."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check recipe and data, print steps, lengths, memory and time."),
    ] = False,
    json_output: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train an embedding model with Iterative Contrastive Refinement.

    Checkpoints are written as the recipe says; stopped or killed, the same command with --resume goes on from the last
    one. The losses of the single steps L_1..L_K are logged to OUTPUT/log.jsonl, and so are the scores of the recipe's
    evaluation; the checkpoint with the best mean then becomes the model.

    [bold]Examples[/bold]

      gircse train recipes/smollm2-135m-quick.yaml --data data/train --dry-run
      gircse train recipes/smollm2-135m-quick.yaml --data data/train -o runs/quick
      gircse train recipes/smollm2-135m-quick.yaml --data data/train -o runs/quick --resume
      gircse train recipes/smollm2-135m-quick.yaml --data data/train -o runs/quick-k0 --num-steps 0
      gircse train recipes/own-data.yaml --data DATA -o runs/mine       pairs of your own
      gircse train recipes/smollm2-135m-quick.yaml -o runs/last --set model.pooling=last --set loss.temperature=0.05
    """
    if output is None and not dry_run:
        raise UsageError("name the folder of the trained model with -o, or look first with --dry-run")
    overrides: dict[str, Any] = {}
    for change in changes or ():
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, e.g. training.learning_rate=1e-4, not {change!r}")
        overrides[key] = value
    if data is not None:
        overrides["data.folder"] = data
    if eval_data is not None:
        overrides["evaluation.folder"] = eval_data
    if num_steps is not None:
        overrides["model.num_steps"] = num_steps
    if num_steps == 0:  # what is about soft tokens goes with them
        of_steps = {"training.random_steps": None, "training.steps_distribution": "uniform"}
        of_steps |= {"loss.prompt_step": False, "loss.soft_token_gradients": "full"}
        overrides = of_steps | overrides

    with stderr.status("importing the trainer"):
        from gircse.train.recipe import load_recipe

        loaded = load_recipe(recipe, overrides)
        from gircse.train.callbacks import RunLog
        from gircse.train.plan import try_recipe
        from gircse.train.run import is_first_process, last_step, leave_processes
        from gircse.train.run import train as run
    if output is None or dry_run:
        with stderr.status("reading the data"):
            tried = try_recipe(loaded)
        _print_json(tried) if json_output else _print_dry_run(tried, loaded)
        if tried.problems:
            raise typer.Exit(1)
        return
    model = run(loaded, output, resume=resume, report=RunLog(output / "log.jsonl", last_step(output)))
    leave_processes()
    if not is_first_process():
        return
    if json_output:
        print(json.dumps({"output": str(output), "num_steps": model.num_steps}))
    else:
        stderr.print(f'saved to {output}; try: gircse similarity --model {output} "one text" "another"')


def _print_json(tried: DryRun) -> None:
    """The plan, and beside it what a run would not find; where backbone or data are missing, the settings alone."""
    plan = {"settings": tried.settings} if tried.plan is None else asdict(tried.plan)
    problems = {name: str(error) for name, error in tried.problems.items()}
    print(json.dumps({**plan, "checked": tried.checked, "problems": problems}))


def _print_dry_run(tried: DryRun, recipe: Recipe) -> None:
    console, settings = Console(highlight=False, soft_wrap=True), tried.settings
    steps, lora = settings["num_steps"], settings["lora"]
    steps = f"{steps[0]} to {steps[1]}" if isinstance(steps, list) else steps
    if settings.get("steps_distribution") == "log_uniform":
        steps = f"{steps}, each in proportion to 1/K"
    sizes = "all weights are trained" if lora is None else ", ".join(f"{key} {value}" for key, value in lora.items())
    console.print(
        f"[bold]the recipe is valid[/]\n"
        f"  K {steps}, λ {settings['refinement_weight']:g}, τ {settings['temperature']:g}"
        f"{f', gradients of soft tokens {kind}' if (kind := settings.get('soft_token_gradients')) else ''}\n"
        f"  learning rate {settings['learning_rate']:g}, {settings['schedule']} after {settings['warmup_steps']} steps "
        f"of warm-up{f', at its end after {limit:g} minutes' if (limit := settings.get('max_minutes')) else ''}\n"
        f"  LoRA: {sizes}\n"
        f"  losses go to log.jsonl{''.join(f', {name}' for name in settings['trackers'])}"
    )
    if tried.plan is not None:
        _print_plan(tried.plan, recipe)
    if tried.problems:
        console.print(f"[bold]checked[/]: {', '.join(tried.checked) or 'nothing'}\n[bold]not to be had[/]:")
        for name, error in tried.problems.items():
            console.print(f"  {escape(f'{name}: {error}')}")


def _print_plan(plan: TrainingPlan, recipe: Recipe) -> None:
    from gircse.train.recipe import warm_up_advice

    console, minutes = Console(highlight=False, soft_wrap=True), plan.seconds_per_step * plan.steps / 60
    took = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
    rows = recipe.training.batch_size
    console.print(f"[bold]{sum(plan.examples.values()):,} examples[/] in {plan.steps:,} steps of {rows} rows")
    if advice := warm_up_advice(recipe, plan.steps):
        console.print(f"  [yellow]{advice}[/]")
    for name, count in plan.examples.items():
        console.print(f"  {count:>9,}  {name}")
    console.print(f"[bold]tokens a text[/]: mean {plan.mean_tokens:.0f}, {plan.longest_share:.0%} are cut")
    for bound, share in plan.histogram:
        label = f"up to {bound}" if bound else "longer"
        console.print(f"  {label:>9}  {'█' * round(40 * share)} {share:.0%}")
    console.print(
        f"[bold]parameters[/]: {plan.parameters / 1e6:,.0f} M, {plan.trained_parameters / 1e6:,.1f} M of them trained\n"
        f"[bold]memory[/]: about {plan.memory_bytes / 2**30:.1f} GiB\n"
        f"[bold]time[/]: at least {plan.seconds_per_step:.1f} s a step, {took} "
        f"in all, at the {plan.matrix_flops / 1e9:,.0f} GFLOPS of matrix products measured here"
    )
    if (evaluation := plan.evaluation) is not None:
        items = f"up to {evaluation['limit']} items a task" if evaluation["limit"] else "all items"
        console.print(f"[bold]evaluation[/]: every {evaluation['every']} steps and at the end, {items}")
        for name, files in evaluation["tasks"].items():
            console.print(f"  {name} ({files})")
