"""The MONAI Label app, its rooms from the door inwards.

app, serve, settings    what starts
gate        who may ask what: hosts, origins, names, sizes, JSON
answers     one request to one reply: the models that clicks go to, and what they share
runs        a quantization or fine-tuning, from the request to the published model
page        what a person reads in the browser
upstream    all that knows the inside of MONAI Label 0.8.5; each part goes when upstream mends it
"""
