"""Runs of the trainers: a quantization or fine-tuning from the request to the published model.

record      what a run is: one frozen record, from the moment it is accepted
folder      the folder of models, where records, artifacts and reports lie
queue       the server's side: accepts runs, starts their processes, stops them, says how they ended
process     a run's own process
reporter    what that process says of itself
quantizing, finetuning    the trainers
"""
