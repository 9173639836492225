# The package and what it needs from PyPI; nothing else is downloaded.
FROM python:3.11-slim-bookworm

WORKDIR /opt/medct
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[reports,app,serve]' \
    && useradd --create-home medct

# Not in the sources' folder, which would hide the installed package.
WORKDIR /home/medct
USER medct
EXPOSE 7860
ENTRYPOINT ["medct"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860"]
