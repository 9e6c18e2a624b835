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
- --shutdown-grace-period-secs={{ .Values.engine.drainSeconds }}
{{- if .Values.engine.apiKeySecret.name }}
- --api-key=$(LT_API_KEY)
{{- end }}
{{- range $g.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- /* Who may add workers, empty caches and the like: the key of adminKeySecret, else one that each pod makes for
itself and nobody knows. The gateway takes it as an argument only, so a shell puts it there. */ -}}
{{- define "lt.gatewayStart" -}}
: "${LT_ADMIN_KEY:=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')}"
exec python3 -m sglang_router.launch_router "$@" --control-plane-api-keys "chart:operator:admin:$LT_ADMIN_KEY"
{{- end }}
