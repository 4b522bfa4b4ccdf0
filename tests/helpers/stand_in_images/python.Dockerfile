# In place of python:*-slim: Debian with a Python below /usr/local.
ARG DEBIAN
FROM ${DEBIAN}
RUN apt-get update && \
    apt-get install -y --no-install-recommends libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8 \
    libsqlite3-0 libssl3 libuuid1 zlib1g && \
    rm -rf /var/lib/apt/lists/*
COPY python /usr/local
COPY pip /etc/pip
RUN ldconfig && ln -sf python3 /usr/local/bin/python && mv /etc/pip/pip.conf /etc/pip.conf
CMD ["python3"]
