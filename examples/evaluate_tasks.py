"""Score an artifact on tasks of lm-eval, and say what was cut off.

    pip install 'tokenmill[lm-eval]'
    python examples/evaluate_tasks.py model.tm arc_easy hellaswag --limit 200
    python examples/evaluate_tasks.py model.tm my_task --include folder/with/my_task.yaml

Tasks of lm-eval's own list fetch their data from the Hugging Face hub; a YAML task of yours may read
local files (dataset_path: json).
"""

from __future__ import annotations

import argparse

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tokenmill.harness import TokenmillLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="a directory that `tokenmill optimize` wrote")
    parser.add_argument("tasks", nargs="+", help="names of tasks")
    parser.add_argument("--include", metavar="FOLDER", help="where more tasks are, as YAML files")
    parser.add_argument("--shots", type=int, help="examples in the prompt; default: the task's own")
    parser.add_argument("--limit", type=int, help="only the first so many of each task")
    options = parser.parse_args()

    model = TokenmillLM(options.artifact)
    found = simple_evaluate(
        model=model,
        tasks=options.tasks,
        num_fewshot=options.shots,
        limit=options.limit,
        task_manager=TaskManager(include_path=options.include),
    )
    print(make_table(found))
    if model.truncated:
        print(f"{model.truncated} requests were too long for the model and lost their beginning")


if __name__ == "__main__":
    main()
