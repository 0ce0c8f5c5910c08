from segfit.report.evaluation import Evaluation


def make_evaluation(config, task, options, path, data):
    return Evaluation(path, task, {})
