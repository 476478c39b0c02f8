"""What a run leaves behind besides its weights."""


def report_pretraining(trainer, model_args, data_args, found, notes, results, wall):
    print(results)
    return results
