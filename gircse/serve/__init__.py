"""The embedding server: OpenAI's HTTP interface over a batching engine, and the playground.

`gircse.serve.engine` owns the model and knows no HTTP; `service` is what a request means; `app` is HTTP and no more.
"""
