"""`granite-switch play`: a local web page to try a model. The extra `play` installs its requirements (Gradio, httpx).

`session` is one browser's conversation with its measurements, `views` renders it as HTML, and `page` binds both to
Gradio. `local` and `remote` are the two engines. Only `page` imports Gradio, and only `local` imports torch.
"""
