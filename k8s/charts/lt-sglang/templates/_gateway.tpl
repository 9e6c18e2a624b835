{{- define "lt.gatewayArgs" -}}
{{- $g := .Values.gateway -}}
- --host=0.0.0.0
- --port={{ int $g.port }}
- --prometheus-host=0.0.0.0
- --prometheus-port=29000
- --policy={{ $g.policy }}
- --service-discovery
- {{ printf "--service-discovery-namespace=%s" .Release.Namespace | quote }}
- --service-discovery-port={{ int .Values.engine.port }}
- --selector
- {{ printf "app.kubernetes.io/instance=%s" .Release.Name | quote }}
- app.kubernetes.io/component=engine
- lt-sglang/serves=http
# /ready turns 503 at the first moment of a drain, and costs the engine nothing.
- --health-check-endpoint=/ready
- --health-check-interval-secs=5
- --health-check-timeout-secs=5
- --health-failure-threshold=2
- --health-success-threshold=1
- --worker-startup-timeout-secs={{ mul .Values.engine.startupMinutes 60 }}
- --request-timeout-secs={{ add .Values.engine.drainSeconds 600 }}
- --shutdown-grace-period-secs={{ int .Values.engine.drainSeconds }}
{{- if .Values.engine.apiKeySecret.name }}
- --api-key=$(LT_API_KEY)
{{- end }}
{{- with .Values.tracing.endpoint }}
- --enable-trace
- {{ printf "--otlp-traces-endpoint=%s" . | quote }}
{{- end }}
{{- range $g.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- /* Who may add workers, empty caches and the like: the key of adminKeySecret, else one that each pod makes for
itself and nobody knows. The gateway takes it as an argument only, so a shell puts it there. */ -}}
{{- define "lt.gatewayStart" -}}
: "${LT_ADMIN_KEY:=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')}"
(umask 077; printf %s "$LT_ADMIN_KEY" > "${TMPDIR:-/tmp}/admin-key")
exec python3 -m sglang_router.launch_router "$@" --control-plane-api-keys "chart:operator:admin:$LT_ADMIN_KEY"
{{- end }}

{{- define "lt.gatewayEnv" -}}
{{- if .Values.engine.apiKeySecret.name }}
{{ include "lt.secretEnv" (list "LT_API_KEY" .Values.engine.apiKeySecret) }}
{{- end }}
{{- if .Values.adminKeySecret.name }}
{{ include "lt.secretEnv" (list "LT_ADMIN_KEY" .Values.adminKeySecret) }}
{{- end }}
{{- end }}

{{- /* Takes engines out whose pods are gone, which the gateway itself overlooks. */ -}}
{{- define "lt.workersContainer" -}}
{{- $g := .Values.gateway -}}
name: workers
image: {{ include "lt.image" (list . $g.image) | quote }}
imagePullPolicy: {{ $g.image.pullPolicy }}
command: [python3, /opt/lt/workers.py]   # deploy/gateway, in the gateway's image
env:
  {{- with include "lt.gatewayEnv" . }}{{ . | trim | nindent 2 }}{{ end }}
  - {name: GATEWAY, value: "http://127.0.0.1:{{ int $g.port }}"}
  - {name: NAMESPACE, value: {{ .Release.Namespace | quote }}}
  - {name: SELECTOR, value: {{ printf "app.kubernetes.io/name=lt-sglang,app.kubernetes.io/instance=%s,app.kubernetes.io/component=engine,lt-sglang/serves=http" .Release.Name | quote }}}
  - {name: ENGINE_PORT, value: {{ int .Values.engine.port | quote }}}
# It touches this file in every round, also if nobody answers. Readiness asks only whether it has begun: the
# gateway serves without it.
readinessProbe:
  exec: {command: [test, -f, /tmp/round]}
livenessProbe:
  exec: {command: [sh, -c, "find /tmp/round -mmin -3 | grep -q ."]}
  periodSeconds: 60
  timeoutSeconds: 5
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {cpu: 200m, memory: 128Mi}
securityContext:
  {{- include "lt.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
{{- end }}
