# In place of chrislusf/seaweedfs: the program, a shell and wget.
ARG DEBIAN
FROM ${DEBIAN}
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* && mkdir /data
COPY --chmod=755 weed /usr/bin/weed
VOLUME /data
ENTRYPOINT ["weed"]
