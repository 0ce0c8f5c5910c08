from segfit.tasks.signal.assembly import make_task

from segfit.report.evaluation import Evaluation


def make_evaluation(config, device, options, path, data, statistics, extra=()):
    return Evaluation(path, make_task(config, device), {})
