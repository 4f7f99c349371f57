"""The protocol: `jchameleon/v1/*.proto` and the messages generated from it.

After a change, from the repository's root:

    python -m grpc_tools.protoc -I jchameleon/serving/proto \
        --python_out=jchameleon/serving/proto --pyi_out=jchameleon/serving/proto \
        jchameleon/serving/proto/jchameleon/v1/*.proto
"""
